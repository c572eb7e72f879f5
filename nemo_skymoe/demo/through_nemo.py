"""The story's front door of NeMo."""

from functools import partial
from pathlib import Path
from typing import Any

import fiddle as fdl
import lightning.pytorch as pl
import nemo_run as run
import torch

from nemo_skymoe.demo.door import Training
from nemo_skymoe.demo.progress import Bar
from nemo_skymoe.moe.mesh import edp_mesh_rows
from nemo_skymoe.nemo import evaluate
from nemo_skymoe.nemo.model import SkyworkMoETinyConfig, SkyworkTinyConfig
from nemo_skymoe.patches import nemo_cpu
from nemo_skymoe.recipes import skywork_moe_tiny, skywork_tiny

FORMAT: str = "nemo"
start_single_rank = evaluate.start_single_rank


def dense(training: Training) -> Any:
    """Return the recipe of `skywork_tiny`."""
    return _recipe(skywork_tiny, training)


def moe(training: Training) -> Any:
    """Return the recipe of `skywork_moe_tiny`."""
    made = _recipe(skywork_moe_tiny, training)
    if training.smoothing is not None:
        made.model.config.moe_adaptive_aux_loss_smoothing = training.smoothing
    return made


def _recipe(module: Any, training: Training) -> Any:
    made = module.pretrain_recipe(**training.arguments())
    made.log.ckpt.save_top_k = 0  # the last one is enough, and the same again
    return made


def train(recipe: Any, bar: Bar) -> list[dict[str, int]]:
    """Run a recipe on this rank, show its progress, and return the mesh that it trained on."""
    nemo_cpu.apply()
    recipe.trainer.callbacks.append(run.Config(Progress, title=bar.title, later=bar.later))
    fdl.build(recipe)()
    return edp_mesh_rows()


class Progress(pl.Callback):
    """Moves a `Bar`. Until a training starts it holds plain values alone.

    NeMo pickles the callbacks of a training into its checkpoints, and nothing but callbacks and plain values is read there.
    """

    def __init__(self, title: str, later: float) -> None:
        self.title = title
        self.later = later
        self._bar: Bar | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the bar on rank 0."""
        if trainer.is_global_zero:
            self._bar = Bar(self.title, self.later)
            self._bar.start(trainer.max_steps)

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        """Move the bar."""
        if self._bar is not None:
            value = trainer.callback_metrics.get("reduced_train_loss")
            self._bar.move(trainer.global_step, None if value is None else float(value))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the finished bar."""
        if self._bar is not None:
            self._bar.stop()


def load(
    checkpoint: Path, vocab_size: int, *, experts: bool, capacity_factor: float | None = None
) -> torch.nn.Module:
    """Return the dense model or the MoE with the weights of a checkpoint."""
    config: Any = (
        partial(SkyworkMoETinyConfig, moe_expert_capacity_factor=capacity_factor)
        if experts
        else SkyworkTinyConfig
    )
    return evaluate.load_model(config(), checkpoint, vocab_size)


def configuration(checkpoint: Path) -> str:
    """Return what a checkpoint says about its model."""
    return (checkpoint / "context" / "model.yaml").read_text()
