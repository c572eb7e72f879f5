"""Every factory at the toy scale, by the command line a user types, forked on two ranks from this process."""

import os
from pathlib import Path
from typing import Any

import fiddle as fdl
import lightning.pytorch as pl
import nemo_run as run
import pytest
import torch

from nemo_skymoe.nemo.pipeline import PipelinePlan
from nemo_skymoe.patches import nemo_cpu
from nemo_skymoe.ranks import run_ranks
from nemo_skymoe.report.curves import read_curves
from tests.recipes.commands import last_checkpoint, losses, nemo_llm
from tests.recipes.factories import FACTORIES, VARIANTS, label

STEPS = 4
SHORT = {"pretrain skywork_13b", "pretrain skywork_moe_146b", "finetune skywork_moe_146b"}
# What starts from a checkpoint is tried from one further below.
FRESH = [(command, arguments) for command, arguments in VARIANTS if "resume_path" not in arguments]
marked = [
    pytest.param(
        variant, id=label(variant), marks=[] if not variant[1] and variant[0] in SHORT else pytest.mark.long
    )
    for variant in FRESH
]


@pytest.mark.parametrize("variant", marked)
def test_a_toy_trains(variant: tuple[str, dict[str, Any]], workplace: Path) -> None:
    command, arguments = variant
    name = label(variant).replace("=", "-").replace(",", "-")
    nemo_llm(workplace, *command.split(), scale="toy", name=name, **arguments)
    seen = losses(workplace, name)
    # ln(vocabulary of 512) = 6.24, the loss of untrained weights.
    assert len(seen) == STEPS and 6.2 < seen[0] < 6.3 and max(seen) < 6.3
    assert (last_checkpoint(workplace, name) / "weights").is_dir()


class Watch(pl.Callback):
    """Learning rates of the groups after each step, and the parameters that changed."""

    def __init__(self) -> None:
        self.rates: list[set[float]] = []
        self.changed: set[str] = set()

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.first = {name: p.detach().clone() for name, p in module.named_parameters()}

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        self.rates.append({group["lr"] for group in trainer.optimizers[0].param_groups})

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.changed = {n for n, p in module.named_parameters() if not torch.equal(p, self.first[n])}


def watched(folder: Path, recipe: Any) -> tuple[list[set[float]], set[str]]:
    os.chdir(folder)
    nemo_cpu.apply()
    watch, partial = Watch(), fdl.build(recipe)
    partial.keywords["trainer"].callbacks.append(watch)
    partial()
    return watch.rates, watch.changed


def test_the_experts_have_a_learning_rate_of_their_own_and_both_go_to_zero(workplace: Path) -> None:
    factory = FACTORIES["pretrain skywork_moe_1p8b"]
    recipe = factory(learning_rates="expert", scale="toy", name="rates")
    [(rates, _), *_] = run_ranks(watched, 2, workplace, recipe)
    assert [len(step) for step in rates] == [2, 2, 2, 1]
    assert all(min(step) == pytest.approx(max(step) / 4) for step in rates[:-1])
    assert (max(rates[0]), max(rates[2]), rates[3]) == (6e-3, pytest.approx(6e-4), {0.0})
    curves = read_curves(workplace / "runs" / "tensorboard" / "rates")
    logged = {tuple(curves[name].values) for name in curves if name.startswith("lr-")}
    assert len(logged) == 2


def test_train_only_ffn_changes_nothing_else(workplace: Path) -> None:
    factory = FACTORIES["pretrain skywork_1p3b"]
    recipe = factory(
        train_only_ffn=True, resume_path="dense", max_lr=1e-2, min_lr=1e-2, scale="toy", name="ffn"
    )
    recipe.resume.restore_config = None
    [(_, changed), *_] = run_ranks(watched, 2, workplace, recipe)
    assert {name.split("layers.")[-1] for name in changed} == {
        f"{layer}.mlp.linear_{fc}.weight" for layer in (0, 1) for fc in ("fc1", "fc2")
    }


@pytest.mark.long
def test_the_146b_on_two_stages_of_two_ranks_with_a_plan(workplace: Path) -> None:
    recipe = FACTORIES["pretrain skywork_moe_146b"](scale="toy", name="stages")
    recipe.trainer.devices, recipe.trainer.strategy.pipeline_model_parallel_size = 4, 2
    recipe.pipeline = run.Config(PipelinePlan, layout="Et|tL", recompute=[[1], [0]])
    run_ranks(watched, 4, workplace, recipe)
    nemo_llm(workplace, "pretrain", "skywork_moe_146b", scale="toy", name="one_stage")
    # The stages draw their weights from seeds of their own.
    assert losses(workplace, "stages") == pytest.approx(losses(workplace, "one_stage"), abs=0.1)
