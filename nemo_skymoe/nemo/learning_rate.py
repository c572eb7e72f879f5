"""Learning rates by step and by kind of parameter, for NeMo's `MegatronOptimizerModule`."""
# No `from __future__ import annotations`: NeMo-Run reads these signatures.

import math
from collections.abc import Callable
from typing import Any

from nemo.lightning.pytorch.optim.base import LRSchedulerModule
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from nemo_skymoe.config import ConfigurationError

SHAPES: dict[str, Callable[[float], float]] = {
    "cosine": lambda progress: (1 + math.cos(math.pi * progress)) / 2,
    "linear": lambda progress: 1 - progress,
    "constant": lambda progress: 1.0,
}
"""For each shape a function from progress, 0 to 1, to the share that is left of the way from the peak to the final
fraction."""


class LearningRateSchedule(LRSchedulerModule):
    """Warm-up, then a shape from the peak down to a fraction of it, and at the end, optionally, a line to zero.

    NeMo's own schedules end at an absolute `min_lr`, the same for parameters with another peak; here every
    parameter group keeps its proportion to the others at every step.

    Args:
        shape: "cosine", "linear" or "constant".
        warmup_steps: Optimizer steps of the linear warm-up.
        max_steps: Optimizer steps in all; NeMo sets it to `trainer.max_steps`.
        final_fraction: Share of the peak that is left after the shape.
        decay_steps: The last steps of `max_steps`, in which that share goes to zero.

    Raises:
        ConfigurationError: A shape that does not exist, or a fraction or numbers of steps out of range.
    """

    def __init__(
        self,
        shape: str = "cosine",
        warmup_steps: int = 0,
        max_steps: int = 10,
        final_fraction: float = 0.1,
        decay_steps: int = 0,
    ) -> None:
        super().__init__()
        if shape not in SHAPES:
            raise ConfigurationError(
                f"the learning rate's shape is {shape!r}, expected one of {', '.join(SHAPES)}"
            )
        if not 0 <= final_fraction <= 1:
            raise ConfigurationError(
                f"final_fraction is {final_fraction}, expected 0 to 1, a share of the peak"
            )
        if warmup_steps < 0 or decay_steps < 0:
            raise ConfigurationError(
                f"warmup_steps is {warmup_steps} and decay_steps {decay_steps}, expected no negative number"
            )
        if max_steps < 1:
            raise ConfigurationError(f"max_steps is {max_steps}, expected at least 1 step")
        self.shape = shape
        self.warmup_steps = warmup_steps
        self.max_steps = max_steps
        self.final_fraction = final_fraction
        self.decay_steps = decay_steps

    def factor(self, step: int) -> float:
        """Return the share of the peak at optimizer step `step`, counted from 0."""
        end = self.max_steps - self.decay_steps
        if step <= self.warmup_steps and self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        if step > end and self.decay_steps:
            return self.final_fraction * max(0.0, (self.max_steps - step) / self.decay_steps)
        progress = min(1.0, (step - self.warmup_steps) / max(1, end - self.warmup_steps))
        return self.final_fraction + (1 - self.final_fraction) * SHAPES[self.shape](progress)

    def scheduler(self, model: Any, optimizers: Any) -> Any:
        """Return what Lightning takes: the factor is applied to every parameter group's own peak, once per step."""
        schedule = {"scheduler": LambdaLR(optimizers, self.factor), "interval": "step", "frequency": 1}
        return {"optimizer": optimizers, "lr_scheduler": schedule, "monitor": "val_loss"}


def is_expert_parameter(name: str, parameter: nn.Parameter) -> bool:
    """Say whether a parameter is a routed expert's; Megatron's `scale_lr_cond` multiplies its rate by `lr_mult`."""
    return ".mlp.experts." in name
