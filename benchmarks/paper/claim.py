"""A claim of the report beside what was found here, and how it is decided."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite

from benchmarks.paper.results import Difference

HOLDS, CONTRADICTED, UNDECIDED, NOT_HERE = "holds", "**does not**", "undecided", "cannot be asked here"


@dataclass(frozen=True)
class Claim:
    """One row; `place` in the report, `published` and `ours` as they are printed."""

    place: str
    statement: str
    published: str
    ours: str
    verdict: str
    command: str = ""


def signed(place: str, statement: str, published: float, ours: Difference) -> Claim:
    """A claim about a sign, that of `published`: decided where the confidence interval of `ours` excludes zero."""
    expected = "lower" if published < 0 else "higher"
    verdict = {expected: HOLDS, "undecided": UNDECIDED}.get(ours.verdict, CONTRADICTED)
    return Claim(place, statement, f"{published:+.3f}", str(ours), verdict)


def equal(place: str, statement: str, published: float, ours: Difference, within: float) -> Claim:
    """A claim that a difference is at most `within`, decided where the whole interval is inside or outside."""
    verdict = UNDECIDED
    if isfinite(ours.error):
        if abs(ours.mean) + ours.error <= within:
            verdict = HOLDS
        elif abs(ours.mean) - ours.error > within:
            verdict = CONTRADICTED
    return Claim(place, f"{statement} (within {within:g})", f"{published:+.3f}", str(ours), verdict)
