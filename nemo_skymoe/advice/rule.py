"""The rule of section 3.3, with the cost of an MoE's training in units of the dense checkpoint's cost."""

from enum import StrEnum
from fractions import Fraction

UPCYCLE_BELOW = Fraction(2, 3)
"""This bound is ours. Section 3.3 says "much less than C_dense" and gives no number; its first case, 100B MoE tokens,
has this one."""
SCRATCH_FROM = Fraction(2)
"""The second case of section 3.3 has this ratio: 300B MoE tokens."""
REPORT_GPU_HOURS = 2
"""GPU-hours of an MoE's token over the dense model's, for top-2 (section 3, footnote 1). It makes those two cases 2/3
and 2."""
REPORT_ACTIVATED = 1.7
"""Activated parameters over the dense model's (section 3, footnote 1)."""
REPORT_TOPK = 2
"""Experts per token of the model that both factors are about."""


class Answer(StrEnum):
    """The advice."""

    UPCYCLE = "upcycle"
    SCRATCH = "from scratch"
    GREY = "grey zone"


def answer(ratio: Fraction | float) -> Answer:
    """Return the answer for C_moe / C_dense. The lower bound is in the grey zone, and the upper one is from scratch."""
    if ratio < UPCYCLE_BELOW:
        return Answer.UPCYCLE
    return Answer.GREY if ratio < SCRATCH_FROM else Answer.SCRATCH


def report_ratio(moe_tokens: int, dense_tokens: int) -> Fraction:
    """Return C_moe / C_dense by the report's factor, as an exact fraction."""
    return Fraction(REPORT_GPU_HOURS * moe_tokens, dense_tokens)
