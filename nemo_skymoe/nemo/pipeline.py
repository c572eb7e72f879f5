"""A pipeline plan in NeMo, for the argument `pipeline=run.Config(PipelinePlan, ...)` of a recipe."""
# No `from __future__ import annotations`: NeMo-Run reads these annotations.

import copy
from dataclasses import dataclass, fields
from typing import Any, Optional

import lightning.pytorch as pl

from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.pipeline.apply import apply_layout, apply_recompute
from nemo_skymoe.pipeline.written_plan import read_plan


@dataclass
class PipelinePlan:
    """The layers and the recomputed layers of every pipeline stage, as `skymoe plan` prints them.

    The strategy's `pipeline_model_parallel_size` is the number of stages. The number of virtual stages follows from the
    layout.
    """

    layout: str
    """Megatron's `pipeline_model_parallel_layout`, such as "Et*5|(t*5|)*3t*4L"."""
    recompute: Optional[list[list[int]]] = None
    """`recompute[stage][virtual_stage]` is the number of layers of that chunk, from its first, that are recomputed in
    full. None leaves the model's configuration as it is."""

    def apply(self, model: Any, trainer: Any) -> None:
        """Put the plan on a NeMo model and a trainer with a `MegatronStrategy` that have not been set up yet.

        Raises:
            ConfigurationError: The plan does not fit the model or the strategy, or Megatron cannot do it.
        """
        strategy = trainer.strategy
        other = strategy.pipeline_model_parallel_layout
        if other not in (None, self.layout):
            raise ConfigurationError(
                f"pipeline_model_parallel_layout of trainer.strategy is {other!r}, pipeline.layout {self.layout!r}:"
                " expected one of them, the other None"
            )
        # The strategy puts its sizes on the configuration only when it is connected with the model.
        probe = copy.copy(model.config)
        parallelism = strategy.parallelism
        for option in fields(parallelism):
            if hasattr(probe, option.name):
                setattr(probe, option.name, getattr(parallelism, option.name))
        apply_layout(probe, self.layout, self.recompute)
        strategy.pipeline_model_parallel_layout = self.layout
        # NeMo counts the chunks that it builds by this: without it, half of the layers of two chunks would be missing.
        strategy.virtual_pipeline_model_parallel_size = probe.virtual_pipeline_model_parallel_size
        model.config.batch_p2p_comm = probe.batch_p2p_comm
        if self.recompute is not None:
            trainer.callbacks.append(_ApplyRecompute(self.recompute))


def written_plan(file: str) -> PipelinePlan:
    """Read the plan that `skymoe plan --output` wrote, for the argument `pipeline=run.Config(written_plan, file=...)`.

    The file is read where and when the training starts.

    Raises:
        ConfigurationError: The file does not exist, or is not a plan.
    """
    return PipelinePlan(*read_plan(file))


class _ApplyRecompute(pl.Callback):
    """Tells the blocks which layers to recompute as soon as NeMo has built them, in a resumed run too."""

    def __init__(self, recompute: list[list[int]]) -> None:
        self.recompute = recompute

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        chunks: Any = trainer.model
        apply_recompute(list(chunks), self.recompute)
