"""Training in phases (section 5). Each phase has its tokens, its mixture and its learning-rate schedule."""

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.data.mixture import DEFAULT, parse
from nemo_skymoe.experiments.schedule import SHAPES, Schedule


@dataclass(frozen=True)
class Phase:
    """One phase of a training.

    Args:
        tokens: Number of tokens to train on, rounded up to whole steps.
        max_lr: Learning rate after the warm-up.
        min_lr: Learning rate at the end of the phase.
        mixture: Domains and weights, such as "en:7 zh:2 code:1".
        shape: "cosine", "linear" or "constant", from `max_lr` to `min_lr`.
        warmup_steps: Optimizer steps from near zero to `max_lr`.

    Raises:
        ConfigurationError: A value makes no sense. The message names it.
    """

    tokens: float
    max_lr: float
    min_lr: float
    mixture: str = DEFAULT
    shape: str = "cosine"
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        for name in ("tokens", "max_lr"):
            if not _is_number(getattr(self, name)) or getattr(self, name) <= 0:
                raise ConfigurationError(f"{name} is {getattr(self, name)!r}, expected a positive number")
        if not _is_number(self.min_lr) or not 0 <= self.min_lr <= self.max_lr:
            raise ConfigurationError(f"min_lr is {self.min_lr!r}, expected 0 to max_lr={self.max_lr}")
        if self.shape not in SHAPES:
            raise ConfigurationError(f"shape is {self.shape!r}, expected one of {', '.join(SHAPES)}")
        if type(self.warmup_steps) is not int or self.warmup_steps < 0:
            raise ConfigurationError(f"warmup_steps is {self.warmup_steps!r}, expected a number of steps")
        object.__setattr__(self, "mixture", str(parse(self.mixture)))

    def steps(self, tokens_per_step: int) -> int:
        """Return the number of optimizer steps that see at least the phase's tokens.

        Raises:
            ConfigurationError: The warm-up is as long as the phase.
        """
        steps = -(-round(self.tokens) // tokens_per_step)
        if self.warmup_steps >= steps:
            raise ConfigurationError(
                f"warmup_steps is {self.warmup_steps}, expected fewer than the {steps} steps that {self.tokens:g}"
                " tokens take"
            )
        return steps

    def schedule(self, tokens_per_step: int) -> Schedule:
        """Return the phase's learning rate, as shares of its own peak."""
        return Schedule(
            shape=self.shape,
            warmup_steps=self.warmup_steps,
            max_steps=self.steps(tokens_per_step),
            final_fraction=self.min_lr / self.max_lr,
        )


def read_phases(file: Path) -> list[Phase]:
    """Read a YAML list of phases, whose keys are those of `Phase`.

    Raises:
        ConfigurationError: The file cannot be read, or a phase in it does not fit. The message has its number and key.
    """
    try:
        values = yaml.safe_load(file.read_text())
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as reason:
        raise ConfigurationError(f"the phases in '{file}' cannot be read: {reason}") from None
    if not isinstance(values, list) or not values:
        raise ConfigurationError(f"'{file}' is {type(values).__name__}, expected a list of phases")
    return [_phase(value, f"phase {number} of '{file}'") for number, value in enumerate(values, start=1)]


def _phase(value: Any, place: str) -> Phase:
    known = [field.name for field in fields(Phase)]
    if not isinstance(value, dict) or not set(value) <= set(known):
        raise ConfigurationError(f"{place} is {value!r}, expected the keys {', '.join(known)}")
    for name in ("tokens", "max_lr", "min_lr"):
        if name not in value:
            raise ConfigurationError(f"{place} has no {name}")
    numbers = {name: _number(value[name]) for name in ("tokens", "max_lr", "min_lr")}
    try:
        return Phase(**(value | numbers))
    except ConfigurationError as reason:
        raise ConfigurationError(f"{place}: {reason}") from None


def _number(value: Any) -> Any:
    """Turn text into a number if it is one, because YAML reads 1e9 as text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
