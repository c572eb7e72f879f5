"""Megatron-Core trains, checkpoints and resumes on a CPU: every layout against one rank, resume bit for bit."""

import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch._dynamo import trace_rules

from nemo_skymoe.patches import cpu_runtime, nemo_cpu
from nemo_skymoe.ranks import run_ranks
from tests.cases import every
from tests.patches.tiny_gpt import FORMATS, Case, Run, groups

DENSE, MOE = Case(), Case(experts=4)
LAYOUTS = [
    Case(),
    Case(distributed=True),
    Case(distributed=True, overlap=True),
    Case(tp=2),
    Case(tp=2, sequence_parallel=True),
    Case(tp=2, sequence_parallel=True, distributed=True),
    Case(pp=2),
    Case(pp=2, distributed=True),
    Case(pp=2, vpp=2),
    Case(pp=2, vpp=2, more={"overlap_p2p_comm": True, "batch_p2p_comm": False}),
    Case(
        pp=2, more={"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    ),
    Case(experts=4),
    Case(experts=4, ep=2),
    Case(experts=4, ep=2, distributed=True),
    Case(experts=4, ep=2, tp=2, sequence_parallel=True),
    Case(experts=4, ep=2, more={"moe_token_dispatcher_type": "alltoall"}),
]
STEPS = (0, 1, 2)


def _one_rank(folder: Path) -> list[list[tuple[float, float]]]:
    """Trajectories of the dense and of the expert model from weights that it leaves in `folder`."""
    cpu_runtime.apply()
    trajectories = []
    for name, case in (("dense", DENSE), ("moe", MOE)):
        with groups(case):
            run = Run(case)
            run.save(folder / name, PLAIN)
            trajectories.append(run.train(*STEPS))
    return trajectories


def _two_ranks(folder: Path) -> list[list[tuple[float, float]]]:
    cpu_runtime.apply()
    trajectories = []
    for case in LAYOUTS:
        with groups(case):
            run = Run(case)
            run.load_model(folder / ("moe" if case.experts else "dense"))
            trajectories.append(run.train(*STEPS))
    return trajectories


@pytest.fixture(scope="module")
def trajectories() -> dict[str, list[tuple[float, float]]]:
    """(loss, gradient norm) a step of every layout, and of one rank under "dense" and "moe"."""
    with tempfile.TemporaryDirectory() as folder:
        [reference] = run_ranks(_one_rank, 1, Path(folder))
        layouts = run_ranks(_two_ranks, 2, Path(folder))[-1]
    return {"dense": reference[0], "moe": reference[1], **dict(zip(map(str, LAYOUTS), layouts, strict=True))}


@every("case", LAYOUTS, ids=str)
def test_two_ranks_follow_one(case: Case, trajectories: dict[str, list[tuple[float, float]]]) -> None:
    # Adam's updates carry a wrong gradient into the next loss; the norm shows one that is only scaled.
    reference = trajectories["moe" if case.experts else "dense"]
    for ours, theirs in zip(trajectories[str(case)], reference, strict=True):
        assert ours == pytest.approx(theirs, rel=2e-5)
    losses = [loss for loss, _ in reference]
    assert max(losses) - min(losses) > 0.01


PLAIN = "plain"
ALONE = [
    (Case(), PLAIN),
    (Case(distributed=True), "dp_reshardable"),
    (Case(distributed=True), "fully_reshardable"),
    (Case(distributed=True), "fully_sharded_model_space"),
]
ON_TWO = [
    (Case(pp=2, vpp=2, distributed=True), "fully_reshardable"),
    (Case(tp=2, sequence_parallel=True, distributed=True), "fully_sharded_model_space"),
    (Case(experts=4, ep=2, distributed=True), "dp_reshardable"),
]
MORE_ON_TWO = [
    (Case(tp=2), PLAIN),
    (Case(distributed=True), "dp_reshardable"),
    (Case(distributed=True), "fully_reshardable"),
]


def _resumes(rows: list[tuple[Case, str]], folder: Path) -> dict[str, list[str]]:
    """What a resumed run does not have in common with the other, by case."""
    cpu_runtime.apply()
    torch.distributed.init_process_group("gloo")
    differences = {}
    for index, (case, sharding) in enumerate(rows):
        if sharding not in FORMATS | {PLAIN}:
            continue
        with groups(case):
            straight = Run(case)
            straight.train(0, 1)
            straight.save(folder / str(index), sharding)
            expected = straight.train(2, 3)
            resumed = Run(case)
            resumed.load(folder / str(index), sharding)
            different = [] if resumed.train(2, 3) == expected else ["loss"]
            after, wanted = resumed.parameters(), straight.parameters()
            different += [name for name in wanted if not torch.equal(after[name], wanted[name])]
            differences[f"{case} {sharding}"] = different
    return differences


def resumes_are_exact(ranks: int, rows: list[tuple[Case, str]], folder: Path) -> None:
    found = run_ranks(_resumes, ranks, rows, folder)
    assert all(found) and found == [{case: [] for case in rank} for rank in found]


def test_resume_is_exact(tmp_path: Path) -> None:
    resumes_are_exact(1, ALONE[:2], tmp_path)


def test_resume_is_exact_on_two_ranks(tmp_path: Path) -> None:
    resumes_are_exact(2, ON_TWO, tmp_path)


@pytest.mark.long
def test_resume_is_exact_in_the_other_formats_and_layouts(tmp_path: Path) -> None:
    for ranks, rows in ((1, ALONE[2:]), (2, MORE_ON_TWO)):
        (tmp_path / str(ranks)).mkdir()
        resumes_are_exact(ranks, rows, tmp_path / str(ranks))


def test_nothing_is_touched_where_cuda_is_available(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    before = torch.zeros, torch.Tensor.to, torch.Tensor.type, torch.cuda.current_device, torch.cuda.Stream
    assert cpu_runtime.apply() == nemo_cpu.apply() == []
    assert cpu_runtime.applied() == nemo_cpu.applied() == []
    assert before == (
        torch.zeros,
        torch.Tensor.to,
        torch.Tensor.type,
        torch.cuda.current_device,
        torch.cuda.Stream,
    )


def test_apply_is_idempotent() -> None:
    def world() -> tuple[list[str], list[str], bool]:
        first, zeros = cpu_runtime.apply(), torch.zeros
        return first, cpu_runtime.apply(), zeros is torch.zeros

    [(first, second, same)] = run_ranks(world, 1)
    assert first == second == list(cpu_runtime.substitutions())
    assert same


def _devices() -> dict[str, str]:
    cuda = torch.device("cuda")
    tensor = torch.zeros(2)
    tensors = {
        "name": torch.ones(2, device="cuda:0"),
        "index": torch.empty(2, device=0),
        "device": torch.tensor([1.0], device=cuda, pin_memory=True),
        "none": torch.arange(3, device=None),
        "like": torch.zeros_like(tensor, device=cuda),
        "new": tensor.new_empty(2, device="cuda"),
        "to name": tensor.to("cuda"),
        "to keyword": tensor.to(device=cuda, dtype=torch.float64),
        "to tensor": tensor.to(torch.ones(1, dtype=torch.int32)),
        "cuda": tensor.cuda(0, non_blocking=True),
        "module": torch.nn.Linear(1, 1).to("cuda").cuda().weight,
    }
    with torch.device("meta"):
        tensors["meta"] = torch.ones(2)
        tensors["out of meta"] = torch.ones(2, device="cuda")
    return {name: f"{tensor.device} {tensor.dtype}" for name, tensor in tensors.items()}


def test_every_way_to_ask_for_cuda_gives_the_cpu_in_every_thread() -> None:
    def world() -> tuple[dict[str, str], dict[str, str]]:
        cpu_runtime.apply()
        with ThreadPoolExecutor(1) as pool:
            return _devices(), pool.submit(_devices).result()

    [(here, in_a_thread)] = run_ranks(world, 1)
    assert here == in_a_thread
    assert here.pop("meta") == "meta torch.float32"
    assert here.pop("none") == "cpu torch.int64"
    assert here.pop("to keyword") == "cpu torch.float64"
    assert here.pop("to tensor") == "cpu torch.int32"
    assert set(here.values()) == {"cpu torch.float32"}


def test_torchscript_and_dynamo_still_know_torch() -> None:
    def world() -> list[float]:
        cpu_runtime.apply()
        trace_rules.get_torch_obj_rule_map()  # raises where two names of torch have one object

        def add(x: torch.Tensor) -> torch.Tensor:
            return x.new_ones([2]) + torch.ones([2]).to(x.device) + torch.arange(2)

        return torch.jit.script(add)(torch.ones(2)).tolist()

    assert run_ranks(world, 1) == [[2.0, 3.0]]


def test_a_fork_of_a_rank_trains_too() -> None:
    def world() -> list[tuple[float, float]]:
        cpu_runtime.apply()
        return run_ranks(lambda: _train(Case()), 1)[0]

    assert run_ranks(world, 1)[0] == run_ranks(lambda: cpu_runtime.apply() and _train(Case()), 1)[0]


def test_recomputation_repeats_dropout() -> None:
    dropout = {"hidden_dropout": 0.1, "attention_dropout": 0.1}
    recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}

    def world() -> bool:
        cpu_runtime.apply()
        return _train(Case(more=dropout)) == _train(Case(more={**dropout, **recompute}))

    assert run_ranks(world, 1) == [True]


def _train(case: Case) -> list[tuple[float, float]]:
    with groups(case):
        return Run(case).train(*STEPS)
