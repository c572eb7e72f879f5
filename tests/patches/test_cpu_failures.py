"""What each substitution of the CPU runtime cures: the failure without it, in a fork that has all the others."""

import os
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from _pytest.mark import ParameterSet
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.fusions.fused_bias_gelu import bias_gelu

from nemo_skymoe.patches import cpu_runtime
from nemo_skymoe.ranks import RankFailed, run_ranks
from tests.patches.tiny_gpt import FORMATS, VERSION, Case, Run, groups
from tests.waiting import wait_until


def train(**case: Any) -> Callable[[], list[tuple[float, float]]]:
    def world() -> list[tuple[float, float]]:
        with groups(Case(**case)):
            return Run(Case(**case)).train(0, 1)

    return world


def save(sharding: str) -> Callable[[], None]:
    def world() -> None:
        case = Case(distributed=True)
        with groups(case), tempfile.TemporaryDirectory() as folder:
            run = Run(case)
            run.train(0)
            run.save(Path(folder) / "checkpoint", sharding)

    return world


def save_and_load(sharding: str, used: bool = False) -> Callable[[], None]:
    """Load into a new optimizer, or into one that has `used` its state before."""

    def world() -> None:
        case = Case(distributed=True)
        with groups(case), tempfile.TemporaryDirectory() as folder:
            run = Run(case)
            run.train(0)
            run.save(Path(folder) / "checkpoint", sharding)
            other = Run(case)
            if used:
                other.train(0)
            other.load(Path(folder) / "checkpoint", sharding)

    return world


def broadcast_data() -> None:
    with groups(Case()):
        tensor_parallel.broadcast_data(["tokens"], {"tokens": torch.ones(2, dtype=torch.long)}, torch.long)


def fuse_without_a_compiler() -> None:
    from torch._inductor import config

    torch._dynamo.config.suppress_errors = False  # which importing NeMo sets
    config.force_disable_caches = True
    config.cpp.cxx = ("/nonexistent",)
    bias_gelu(torch.ones(4), torch.ones(4))


def failure(
    name: str, ranks: int, world: Callable[[], Any], message: str, versions: str = "0.14 0.15 0.16"
) -> ParameterSet:
    elsewhere = pytest.mark.skipif(VERSION not in versions, reason=f"only in Megatron-Core {versions}")
    return pytest.param(name, ranks, world, message, marks=elsewhere, id=name)


NO_CUDA = "not compiled with CUDA|re-initialize CUDA in forked"  # torch built without CUDA, and with it
FAILURES = [
    failure("cpu_tensors.factories", 1, train(), NO_CUDA),
    failure("cpu_tensors.tensor_to", 1, lambda: torch.ones(1).to("cuda", non_blocking=True), "CUDA"),
    failure("cpu_tensors.tensor_cuda", 1, broadcast_data, NO_CUDA),
    failure("cpu_tensors.tensor_pin_memory", 1, lambda: torch.ones(1).pin_memory(), "accelerator"),
    failure("cpu_tensors.tensor_type", 1, train(distributed=True), "torch.cuda.FloatTensor"),
    failure("cpu_tensors.tensor_types", 1, lambda: torch.cuda.LongTensor([1]), "not available"),
    failure("cpu_cuda.current_device", 1, train(), NO_CUDA),
    failure("cpu_cuda.streams", 1, train(experts=4, more={"moe_token_dispatcher_type": "alltoall"}), "CUDA"),
    failure("cpu_cuda.random_generator", 1, train(), NO_CUDA),
    failure("cpu_megatron.router_gemm", 1, train(experts=4), "te_general_gemm"),
    failure(
        "cpu_megatron.split_sizes",
        2,
        train(experts=4, ep=2, more={"moe_token_dispatcher_type": "alltoall"}),
        "split",
    ),
    failure("cpu_megatron.compilation", 1, fuse_without_a_compiler, "nonexistent"),
    failure(
        "cpu_megatron.fused_adam",
        1,
        save("dp_reshardable"),
        r"AssertionError: \(torch.Size\(\[\]\), 0, ",
        "0.15",
    ),
    failure(
        "cpu_megatron.fused_adam", 1, save_and_load("fully_reshardable"), r"len\(steps\) == 1", "0.15 0.16"
    ),
    failure(
        "cpu_megatron.fused_adam",
        1,
        save_and_load("fully_reshardable", used=True),
        "KeyError: 'step'",
        "0.15 0.16",
    ),
    failure(
        "cpu_megatron.restored_master_parameters",
        1,
        save_and_load("dp_reshardable"),
        "leaf Variable",
        "0.15 0.16",
    ),
]


def _world(world: Callable[[], Any], without: str | None) -> Any:
    for name, substitute in cpu_runtime.substitutions().items():
        if name != without:
            substitute()
    return world()


@pytest.mark.parametrize(("name", "ranks", "world", "message"), FAILURES)
def test_each_failure_is_cured(name: str, ranks: int, world: Callable[[], Any], message: str) -> None:
    with pytest.raises(RankFailed, match=message):
        run_ranks(_world, ranks, world, name)
    run_ranks(_world, ranks, world, None)


def test_every_substitution_has_its_failure_here() -> None:
    silent = {"cpu_megatron.rng_tracker", "cpu_megatron.batched_p2p", "cpu_megatron.results_queue"}
    assert {row.values[0] for row in FAILURES} | silent == set(cpu_runtime.substitutions())


def test_ranks_of_a_tensor_parallel_group_draw_their_own_numbers() -> None:
    def world() -> tuple[float, float]:
        with groups(Case(tp=2)):
            with tensor_parallel.get_cuda_rng_tracker().fork():
                own = torch.rand(1).item()
            return own, torch.rand(1).item()

    (first, common), (second, same) = run_ranks(_world, 2, world, None)
    assert common == same
    assert len({first, second, common}) == 3
    (first, _), (second, _) = run_ranks(_world, 2, world, "cpu_megatron.rng_tracker")
    assert first == second


def test_two_stages_of_virtual_stages_are_not_confused() -> None:
    world = train(pp=2, vpp=2)
    cured = run_ranks(_world, 2, world, None)[-1]
    wrong = run_ranks(_world, 2, world, "cpu_megatron.batched_p2p")[-1]
    assert cured == run_ranks(_world, 2, train(pp=2, vpp=2, more={"batch_p2p_comm": False}), None)[-1]
    assert wrong[0][1] != pytest.approx(cured[0][1], rel=5e-3)  # the gradient's norm


def test_no_process_outlives_a_rank_that_saved() -> None:
    def world() -> int:
        save(min(FORMATS))()
        queue: Any = getattr(
            filesystem_async, "get_write_results_queue", None
        )  # 0.17 took the underscore away
        return (queue or filesystem_async._get_write_results_queue)()._manager._process.pid

    [outlives] = run_ranks(_world, 1, world, "cpu_megatron.results_queue")
    [ends] = run_ranks(_world, 1, world, None)
    wait_until("the end of the later one", lambda: _ended(ends))
    assert not _ended(outlives)
    os.kill(outlives, signal.SIGKILL)


def _ended(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True
