"""The learning rates of a training in phases (section 5), for NeMo's `MegatronOptimizerModule`."""
# No `from __future__ import annotations`: NeMo-Run reads these signatures.

from typing import Any

import lightning.pytorch as pl
from nemo.lightning.pytorch.optim.base import LRSchedulerModule

from nemo_skymoe.experiments.schedule import phased_factor
from nemo_skymoe.nemo.learning_rate import LearningRateSchedule


class PhasedLearningRate(LRSchedulerModule):
    """One schedule after the other, for one optimizer whose learning rate is the first one's peak.

    Every parameter group keeps its proportion to the others, as in `LearningRateSchedule`.

    Args:
        phases: The schedules. The `max_steps` of each are its own.
        peaks: The peak of each schedule, as a multiple of the first one's.
    """

    def __init__(self, phases: list[LearningRateSchedule], peaks: list[float]) -> None:
        super().__init__()
        self.phases, self.peaks = phases, peaks

    def factor(self, step: int) -> float:
        """Return the multiple of the first peak at optimizer step `step`, counted from 0."""
        return phased_factor([phase.plain() for phase in self.phases], self.peaks, step)

    scheduler = LearningRateSchedule.scheduler

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Set the rate of the next step. The checkpoint's rate does not know of a phase that was added since."""
        for config in trainer.lr_scheduler_configs:
            scheduler: Any = config.scheduler
            for group, peak in zip(scheduler.optimizer.param_groups, scheduler.base_lrs, strict=True):
                group["lr"] = peak * self.factor(scheduler.last_epoch)
