"""torchrun starts as many ranks as the recipe has, on a machine with any number of GPUs."""

from types import SimpleNamespace

import fiddle as fdl
import nemo_run as run
import pytest

from nemo_skymoe import gpus
from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.patches import torchrun_executor
from nemo_skymoe.recipes.executor_ranks import follow_recipe
from nemo_skymoe.recipes.executors import a800_slurm, local_torchrun
from tests.recipes.test_executors import SITE

TINY = SimpleNamespace(devices=2, num_nodes=1)


def torchrun() -> run.LocalExecutor:
    """What `run.executor=torchrun` stands for."""
    torchrun_executor.apply()
    return fdl.build(
        run.cli.cli_parser.parse_factory(run.cli.api.RunContext, "executor", run.LocalExecutor, "torchrun")
    )


def test_the_recipe_decides_and_not_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for found in (0, 2, 8):
        monkeypatch.setattr(gpus, "visible", lambda found=found: ["NVIDIA A800"] * found)
        assert torchrun().ntasks_per_node == (found or torchrun_executor.CPU_RANKS)
        for executor in (torchrun(), fdl.build(local_torchrun())):
            follow_recipe(executor, TINY)
            assert executor.ntasks_per_node == 2


def test_what_is_not_the_recipes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "visible", lambda: ["NVIDIA A800"])
    refused = {
        "trainer.devices is 2, expected at most 1": (torchrun(), TINY),
        "trainer.num_nodes is 4, expected 1": (torchrun(), SimpleNamespace(devices=8, num_nodes=4)),
        "are 1 and 8, expected .*: 1 and 2": (fdl.build(a800_slurm(**SITE)), TINY),
    }
    for message, (executor, trainer) in refused.items():
        with pytest.raises(ConfigurationError, match=message):
            follow_recipe(executor, trainer)


def test_what_decides_for_itself_is_left_alone() -> None:
    executor = torchrun()
    for left, trainer in ((executor, SimpleNamespace(devices="auto", num_nodes=1)), (None, TINY)):
        follow_recipe(left, trainer)
    assert executor.ntasks_per_node == torchrun_executor.CPU_RANKS
    alone = run.LocalExecutor()
    follow_recipe(alone, TINY)
    assert alone.ntasks_per_node == 1
