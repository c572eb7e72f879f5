"""Both front doors train one model: the same losses, norms of gradients and coefficients from the same upcycled weights.

NeMo 2.7.3 on megatron-core 0.15.3 runs in `.venv`, Megatron-Bridge 0.6.2 on 0.19.2 here.
"""

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from megatron.bridge.training.config import SchedulerConfig

from tests.bridge import through_bridge
from tests.docs.pages import ROOT
from tests.doors import case
from tests.doors.case import Trace
from tests.waiting import HANG

NEMO = ROOT / ".venv" / "bin" / "python"


@pytest.fixture(scope="module")
def bridge() -> dict[str, Trace]:
    return through_bridge.traces()


def test_bridge_repeats_the_traces_of_both_doors(bridge: dict[str, Trace]) -> None:
    case.check_equal(bridge, case.read(case.TRACES), case.ANY_CPU)


@pytest.mark.skipif(not NEMO.exists(), reason="NeMo's environment is not there: make test makes it")
def test_both_doors_compute_the_same_on_this_machine(bridge: dict[str, Trace], tmp_path: Path) -> None:
    file = tmp_path / "traces.json"
    command = [str(NEMO), "-m", "tests.doors.through_nemo", str(file)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=4 * HANG
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    case.check_equal(bridge, case.read(file), case.SAME_CPU)


def test_with_bridges_own_schedule_the_doors_would_differ() -> None:
    """Megatron's warm-up begins at a rate of zero, so that its first step changes nothing; ours begins above it."""

    def recipe(**arguments: Any) -> Any:
        made = through_bridge.recipe(**arguments)
        own = made.scheduler
        made.scheduler = SchedulerConfig(
            lr_decay_style=own.lr_decay_style,
            lr_warmup_iters=own.lr_warmup_iters,
            start_weight_decay=own.start_weight_decay,
            end_weight_decay=own.end_weight_decay,
            weight_decay_incr_style=own.weight_decay_incr_style,
        )
        return made

    found = case.traces_through("bridge", recipe, through_bridge.train, ["edp"])["edp"]
    expected = case.read(case.TRACES)["edp"]
    assert found.losses[0] == pytest.approx(expected.losses[0], abs=case.ANY_CPU)
    assert abs(found.losses[1] - expected.losses[1]) > 100 * case.ANY_CPU
