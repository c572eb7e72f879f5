"""Megatron-Core trains, checkpoints and resumes on a CPU: every layout against one rank, resume bit for bit."""

import tempfile
from pathlib import Path

import pytest
from tiny_gpt import Case, Run, groups

from nemo_skymoe.patches import cpu_runtime
from nemo_skymoe.ranks import run_ranks

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
            run.save(folder / name)
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
        [reference] = run_ranks(_one_rank, 1, Path(folder), timeout=120)
        layouts = run_ranks(_two_ranks, 2, Path(folder), timeout=120)[-1]
    return {"dense": reference[0], "moe": reference[1], **dict(zip(map(str, LAYOUTS), layouts, strict=True))}


@pytest.mark.parametrize("case", LAYOUTS, ids=str)
def test_two_ranks_follow_one(case: Case, trajectories: dict[str, list[tuple[float, float]]]) -> None:
    # Adam's updates carry a wrong gradient into the next loss; the norm shows one that is only scaled.
    reference = trajectories["moe" if case.experts else "dense"]
    for ours, theirs in zip(trajectories[str(case)], reference, strict=True):
        assert ours == pytest.approx(theirs, rel=2e-5)
    losses = [loss for loss, _ in reference]
    assert max(losses) - min(losses) > 0.01
