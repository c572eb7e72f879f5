"""The learning-rate schedule of the recipes as Bridge's `SchedulerConfig`, and as Megatron's scheduler."""

from dataclasses import dataclass
from typing import Any

from megatron.bridge.training.config import OptimizerConfig, SchedulerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.experiments.schedule import Schedule, check_shape, phased_factor
from nemo_skymoe.patches import bridge_schedule


@dataclass(kw_only=True)
class SkyworkSchedulerConfig(SchedulerConfig):
    """Bridge's options of the schedule, and those that the report needs beside them.

    `lr_decay_style` is cosine, linear or constant, from `optimizer.lr` to `optimizer.min_lr`, over `lr_decay_iters` steps
    (by default all of the training). The warm-up of `lr_warmup_iters` steps begins above zero. Every group of parameters
    keeps its proportion to the others at every step. A run that continues takes its rates from this configuration, not
    from the checkpoint.
    """

    override_opt_param_scheduler: bool = True
    lr_final_decay_iters: int = 0
    """The last steps of `lr_decay_iters`, in which the rate goes linearly from `optimizer.min_lr` to zero."""
    lr_phases: list[dict[str, Any]] | None = None
    """One schedule after the other in place of all other options: the fields of `experiments.schedule.Schedule`, and
    `peak`, a multiple of `optimizer.lr`."""

    def finalize(self) -> None:
        """Check the options.

        Raises:
            ConfigurationError: A value cannot work. The message names it.
        """
        bridge_schedule.apply()
        check_shape(self.lr_decay_style)
        if self.lr_warmup_init:
            raise ConfigurationError(
                f"scheduler.lr_warmup_init is {self.lr_warmup_init}, expected 0: the warm-up begins one step above zero"
            )
        super().finalize()

    def provide(self, optimizer_config: OptimizerConfig, optimizer: Any) -> "SkyworkScheduler":
        """Return Megatron's scheduler with this schedule, once Bridge has computed the steps."""
        return SkyworkScheduler(self, optimizer_config, optimizer)

    def schedules(self, optimizer_config: OptimizerConfig) -> tuple[list[Schedule], list[float]]:
        """Return the schedules one after the other, and the peak of each as a multiple of `optimizer.lr`.

        Raises:
            ConfigurationError: The learning rates or the numbers of steps make no sense.
        """
        if self.lr_phases is not None:
            plain = [dict(phase) for phase in self.lr_phases]
            peaks = [phase.pop("peak") for phase in plain]
            return [Schedule(**phase) for phase in plain], peaks
        peak, final = optimizer_config.lr, optimizer_config.min_lr or 0.0
        if not peak:
            raise ConfigurationError(f"optimizer.lr is {peak}, expected a number above 0")
        samples: Any = self.lr_decay_steps  # Megatron's steps are samples
        steps: Any = self.lr_decay_iters
        warmup: Any = self.lr_warmup_steps
        schedule = Schedule(
            shape=self.lr_decay_style,
            warmup_steps=round(warmup * steps / samples),
            max_steps=steps,
            final_fraction=final / peak,
            decay_steps=self.lr_final_decay_iters,
        )
        return [schedule], [1.0]


class SkyworkScheduler(OptimizerParamScheduler):
    """Megatron's scheduler, whose rate is a share of each group's peak: that of `experiments.schedule`."""

    def __init__(
        self, config: SkyworkSchedulerConfig, optimizer_config: OptimizerConfig, optimizer: Any
    ) -> None:
        plain: Any = config
        self._samples: int = plain.lr_decay_steps // plain.lr_decay_iters
        self._schedules, self._peaks = config.schedules(optimizer_config)
        super().__init__(
            optimizer,
            init_lr=0.0,
            max_lr=plain_rate(optimizer_config.lr),
            min_lr=plain_rate(optimizer_config.min_lr),
            lr_warmup_steps=plain.lr_warmup_steps,
            lr_decay_steps=plain.lr_decay_steps,
            lr_decay_style=plain.lr_decay_style,
            start_wd=plain.start_weight_decay,
            end_wd=plain.end_weight_decay,
            wd_incr_steps=plain.wd_incr_steps,
            wd_incr_style=plain.weight_decay_incr_style,
            use_checkpoint_opt_param_scheduler=plain.use_checkpoint_opt_param_scheduler,
            override_opt_param_scheduler=plain.override_opt_param_scheduler,
        )

    def get_lr(self, param_group: dict[str, Any]) -> float:
        """Return the learning rate of a group in the step that follows `num_steps` samples."""
        peak: float = param_group.get("max_lr") or self.max_lr
        return peak * phased_factor(self._schedules, self._peaks, self.num_steps // self._samples)


def plain_rate(rate: float | None) -> float:
    """Return the rate, 0 without one."""
    return rate or 0.0
