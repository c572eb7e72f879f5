"""The seed of the initial weights."""

from pathlib import Path
from typing import Any

import fiddle as fdl
import lightning.pytorch as pl
import nemo_run as run
import pytest

from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.data.corpus import build_corpus
from nemo_skymoe.nemo.seed import InitialSeed
from nemo_skymoe.output import redirect_output
from nemo_skymoe.patches import nemo_cpu
from nemo_skymoe.ranks import run_ranks
from nemo_skymoe.recipes import skywork_moe_tiny


class Weights(pl.Callback):
    """Sums of the model's parameters before the first step."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        type(self).found = {name: float(value.double().sum()) for name, value in pl_module.named_parameters()}

    found: dict[str, float]


def initial_weights(folder: Path, name: str, seed: int | None) -> dict[str, float]:
    redirect_output(folder / f"{name}.log")
    nemo_cpu.apply()
    recipe: Any = skywork_moe_tiny.pretrain_recipe(
        dir=str(folder), name=name, corpus=str(folder / "corpus"), scale="toy", edp=1, devices=1
    )
    recipe.trainer.devices, recipe.data.micro_batch_size = 1, recipe.data.global_batch_size
    recipe.trainer.max_steps, recipe.trainer.limit_val_batches = 1, 0
    if seed is not None:
        recipe.trainer.callbacks.append(run.Config(InitialSeed, seed=seed))
    recipe.trainer.callbacks.append(run.Config(Weights))
    fdl.build(recipe)()
    return Weights.found


def test_a_seed_decides_the_initial_weights(tmp_path: Path) -> None:
    build_corpus(tmp_path / "corpus", 512, 0.3, files=["argparse.py", "typing.py", "shutil.py"])
    runs = {"nemo": None, "default": 1234, "again": 1234, "other": 7}
    found = {name: run_ranks(initial_weights, 1, tmp_path, name, seed)[0] for name, seed in runs.items()}
    assert found["nemo"] == found["default"] == found["again"]
    drawn = {name for name, value in found["nemo"].items() if found["other"][name] != value}
    assert {name for name in found["nemo"] if "norm" not in name} == drawn


def test_a_seed_is_positive() -> None:
    with pytest.raises(ConfigurationError, match="seed is 0, expected at least 1"):
        InitialSeed(0)
