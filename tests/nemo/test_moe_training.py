"""A Skywork-MoE trained by NeMo on two ranks with EDP: logs, and an exact resume of everything, coefficients too."""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fiddle as fdl
import lightning.pytorch as pl
import nemo_run as run
import pytest
import torch

from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.data.corpus import build_corpus
from nemo_skymoe.moe.telemetry import METRICS
from nemo_skymoe.nemo.callbacks import SkyworkMoECallback
from nemo_skymoe.patches import nemo_cpu
from nemo_skymoe.ranks import run_ranks
from nemo_skymoe.recipes import skywork_moe_tiny
from nemo_skymoe.report.curves import read_curves

LAYERS, STEPS, CUT = 4, 6, 3


@dataclass
class Kept:
    """What a run left: losses by step, every step's coefficients, every parameter."""

    losses: dict[int, float] = field(default_factory=dict)
    coefficients: list[dict[int, float]] = field(default_factory=list)
    parameters: dict[str, torch.Tensor] = field(default_factory=dict)


class Keep(pl.Callback):
    def __init__(self) -> None:
        self.kept = Kept()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.kept.losses[trainer.global_step] = trainer.callback_metrics["reduced_train_loss"].item()
        (callback,) = [c for c in trainer.callbacks if isinstance(c, SkyworkMoECallback)]  # type: ignore[attr-defined]
        assert callback._controller is not None
        self.kept.coefficients.append(callback._controller.coefficient_by_layer())

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.kept.parameters = {name: p.detach().clone() for name, p in module.named_parameters()}


def recipe(folder: Path, name: str) -> Any:
    made = skywork_moe_tiny.pretrain_recipe(
        dir=str(folder), name=name, corpus=str(folder / "corpus"), max_steps=STEPS, seq_length=64,
        val_check_interval=2, limit_val_batches=1, similarity_interval=2, warmup_steps=1,
    )  # fmt: skip
    made.model.config.seq_length = 64
    # Follows the drop rate fast and far enough to tell steps and layers apart.
    made.model.config.moe_adaptive_aux_loss_smoothing = 0.5
    made.model.config.moe_adaptive_aux_loss_initial = 0.01
    made.model.config.moe_adaptive_aux_loss_maximum = 1.0
    made.model.config.moe_expert_capacity_factor = 1.0
    made.trainer.log_every_n_steps = 1
    made.log.ckpt.every_n_train_steps = CUT
    made.log.ckpt.save_top_k = -1
    return made


def train(made: Any) -> Kept:
    nemo_cpu.apply()
    keep = Keep()
    partial = fdl.build(made)
    partial.keywords["trainer"].callbacks.append(keep)
    partial()
    return keep.kept


class Stop(pl.Callback):
    """Ends a run in the middle, its schedule unchanged."""

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.global_step >= CUT


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        files = [
            "argparse.py",
            "typing.py",
            "inspect.py",
            "pydoc.py",
            "shutil.py",
            "uuid.py",
            "ast.py",
            "pickle.py",
        ]
        build_corpus(Path(name) / "corpus", 512, 0.3, files=files)
        yield Path(name)


@pytest.fixture(scope="module")
def whole(folder: Path) -> list[Kept]:
    return run_ranks(train, 2, recipe(folder, "whole"))


@pytest.fixture(scope="module")
def resumed(folder: Path) -> list[Kept]:
    cut = recipe(folder, "cut")
    cut.trainer.callbacks.append(run.Config(Stop))
    run_ranks(train, 2, cut)
    return run_ranks(train, 2, recipe(folder, "cut"))


def test_coefficients_follow_the_drop_rate_and_agree_on_both_ranks(whole: list[Kept]) -> None:
    first, second = (keep.coefficients for keep in whole)
    assert first == second
    assert len({tuple(step.values()) for step in first}) == STEPS, (
        "the coefficients did not change every step"
    )
    assert len(set(first[-1].values())) == LAYERS, "the layers have the same coefficient"


def test_a_resumed_run_equals_the_uninterrupted_one(whole: list[Kept], resumed: list[Kept]) -> None:
    for expected, found in zip(whole, resumed, strict=True):
        assert min(found.losses) == CUT + 1, "the second run started from scratch"
        assert found.losses == {step: loss for step, loss in expected.losses.items() if step > CUT}
        assert found.coefficients == expected.coefficients[CUT:]
        different = [n for n, p in expected.parameters.items() if not torch.equal(p, found.parameters[n])]
        assert not different


def test_a_warm_start_keeps_or_resets_the_coefficients(folder: Path, whole: list[Kept]) -> None:
    (checkpoint,) = (folder / "whole" / "checkpoints").glob("*-last")
    saved = SkyworkMoECallback(warm_start="keep")._saved_state(checkpoint)
    assert saved == {"aux_loss_coefficients": whole[0].coefficients[-1]}
    with pytest.raises(ConfigurationError, match="warm_start is 'forget'"):
        SkyworkMoECallback(warm_start="forget")


def test_telemetry_reaches_tensorboard_by_global_layer(folder: Path, whole: list[Kept]) -> None:
    curves = read_curves(folder / "tensorboard" / "whole")
    names = {*METRICS, "aux_loss_coefficient"}
    expected = {f"moe/{name}_layer_{layer}" for name in names for layer in range(1, LAYERS + 1)}
    assert expected <= set(curves)
    assert all(len(curves[name]) == STEPS for name in expected)
    # Megatron's own log, which NeMo switched off: the mean over layers of the same losses.
    for step in range(STEPS):
        layers = [curves[f"moe/aux_loss_layer_{layer}"].values[step] for layer in range(1, LAYERS + 1)]
        assert curves["load_balancing_loss"].values[step] == pytest.approx(sum(layers) / LAYERS, rel=1e-5)
    last = whole[0].coefficients[-1]
    for layer in range(1, LAYERS + 1):
        assert curves[f"moe/aux_loss_coefficient_layer_{layer}"].last == pytest.approx(last[layer], rel=1e-6)
        assert curves[f"moe/drop_rate_layer_{layer}"].values.max() > 0
        assert -1 <= curves[f"moe/expert_similarity_layer_{layer}"].values.min() <= 1
