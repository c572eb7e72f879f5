"""A line of the self-check: what was looked at, the verdict, and the figures that it rests on."""

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["ok", "WRONG", "absent", "measured"]
"""Agreement, disagreement, a part that is not installed, or a figure that nothing is compared with."""


@dataclass(frozen=True)
class Finding:
    """One line."""

    verdict: Verdict
    what: str
    figures: str = ""

    def __str__(self) -> str:
        return f"{self.verdict:8} {self.what}{': ' if self.figures else ''}{self.figures}"


def agreement(what: str, difference: float, bound: float) -> Finding:
    """Return the verdict on a relative difference, with its bound."""
    return Finding("ok" if difference <= bound else "WRONG", what, f"{difference:.1e}, at most {bound:.0e}")
