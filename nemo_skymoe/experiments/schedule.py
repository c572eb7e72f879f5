"""The learning rate at every step, as a share of its peak."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from nemo_skymoe.config import ConfigurationError

SHAPES: dict[str, Callable[[float], float]] = {
    "cosine": lambda progress: (1 + math.cos(math.pi * progress)) / 2,
    "linear": lambda progress: 1 - progress,
    "constant": lambda progress: 1.0,
}
"""For each shape a function from progress, 0 to 1, to the share that is left of the way from the peak to the final
fraction."""


def check_shape(shape: str) -> None:
    """Refuse a shape that does not exist.

    Raises:
        ConfigurationError: It is none of `SHAPES`.
    """
    if shape not in SHAPES:
        raise ConfigurationError(
            f"the learning rate's shape is {shape!r}, expected one of {', '.join(SHAPES)}"
        )


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Warm-up, then a shape from the peak down to a fraction of it, and at the end, optionally, a line to zero.

    Raises:
        ConfigurationError: A shape that does not exist, or a fraction or numbers of steps out of range.
    """

    shape: str
    warmup_steps: int
    """Optimizer steps of the linear warm-up."""
    max_steps: int
    """Optimizer steps in all."""
    final_fraction: float
    """Share of the peak that is left after the shape."""
    decay_steps: int = 0
    """The last steps of `max_steps`, in which that share goes to zero."""

    def __post_init__(self) -> None:
        check_shape(self.shape)
        if not 0 <= self.final_fraction <= 1:
            raise ConfigurationError(
                f"final_fraction is {self.final_fraction}, expected 0 to 1, a share of the peak"
            )
        if self.warmup_steps < 0 or self.decay_steps < 0:
            raise ConfigurationError(
                f"warmup_steps is {self.warmup_steps} and decay_steps {self.decay_steps}, expected no negative number"
            )
        if self.max_steps < 1:
            raise ConfigurationError(f"max_steps is {self.max_steps}, expected at least 1 step")

    def factor(self, step: int) -> float:
        """Return the share of the peak at optimizer step `step`, counted from 0."""
        end = self.max_steps - self.decay_steps
        if step <= self.warmup_steps and self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        if step > end and self.decay_steps:
            return self.final_fraction * max(0.0, (self.max_steps - step) / self.decay_steps)
        progress = min(1.0, (step - self.warmup_steps) / max(1, end - self.warmup_steps))
        return self.final_fraction + (1 - self.final_fraction) * SHAPES[self.shape](progress)


def phased_factor(schedules: Sequence[Schedule], peaks: Sequence[float], step: int) -> float:
    """Return the multiple of the first peak at `step` under one schedule after the other.

    Args:
        schedules: The schedules. The `max_steps` of each are its own.
        peaks: The peak of each schedule, as a multiple of the first one's.
        step: The optimizer step, counted from 0.
    """
    ends = list(accumulate(schedule.max_steps for schedule in schedules))
    number = next((n for n, end in enumerate(ends) if step < end), len(ends) - 1)
    schedule = schedules[number]
    return peaks[number] * schedule.factor(step - (ends[number] - schedule.max_steps))
