"""Learning rates by step and by kind of parameter, for NeMo's `MegatronOptimizerModule`."""
# No `from __future__ import annotations`: NeMo-Run reads these signatures.

from typing import Any

from nemo.lightning.pytorch.optim.base import LRSchedulerModule
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from nemo_skymoe.experiments.schedule import Schedule
from nemo_skymoe.moe import EXPERT_PARAMETERS


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
        self.shape = shape
        self.warmup_steps = warmup_steps
        self.max_steps = max_steps
        self.final_fraction = final_fraction
        self.decay_steps = decay_steps
        self.plain()  # checks the values

    def plain(self) -> Schedule:
        """Return the schedule in plain values. They may have changed since it was made, with the length of the run."""
        return Schedule(
            shape=self.shape,
            warmup_steps=self.warmup_steps,
            max_steps=self.max_steps,
            final_fraction=self.final_fraction,
            decay_steps=self.decay_steps,
        )

    def factor(self, step: int) -> float:
        """Return the share of the peak at optimizer step `step`, counted from 0."""
        return self.plain().factor(step)

    def scheduler(self, model: Any, optimizers: Any) -> Any:
        """Return what Lightning takes: the factor is applied to every parameter group's own peak, once per step."""
        schedule = {"scheduler": LambdaLR(optimizers, self.factor), "interval": "step", "frequency": 1}
        return {"optimizer": optimizers, "lr_scheduler": schedule, "monitor": "val_loss"}


def is_expert_parameter(name: str, parameter: nn.Parameter) -> bool:
    """Say whether a parameter is a routed expert's; Megatron's `scale_lr_cond` multiplies its rate by `lr_mult`."""
    return EXPERT_PARAMETERS in name
