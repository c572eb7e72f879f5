"""The record of the demo: the results of its phases for its report, and the settings that they were run with."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SMOOTHING = 0.95
"""Smoothing of the adaptive coefficients, over about 20 steps. The report's 0.99, over 100, would show little in so
short a run."""

DOORS = {"nemo": "NeMo", "bridge": "Megatron-Bridge"}
"""The front doors by name, and what people call them."""


@dataclass
class Story:
    """The results of the phases: folders, losses, times."""

    output: Path
    dense_steps: int
    steps: int
    frontdoor: str = "nemo"
    """The front door that trains, one of `DOORS`."""
    corpus: Any = None
    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)
    mesh: list[dict[str, int]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    memory: int = 0

    device: str = "cpu"
    """The device that trained, "cpu" or "gpu"."""

    @property
    def door(self) -> str:
        """Name the front door as people do."""
        return DOORS[self.frontdoor]

    def folder(self, name: str) -> Path:
        """Return the folder of a phase."""
        return self.output / name


def minutes(seconds: float) -> str:
    """Format a duration for people."""
    whole = round(seconds)
    return f"{whole // 60} min {whole % 60} s" if whole >= 60 else f"{whole} s"
