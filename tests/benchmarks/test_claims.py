"""When a claim holds."""

import re
from pathlib import Path

from benchmarks.paper.claim import CONTRADICTED, HOLDS, UNDECIDED, equal, signed
from benchmarks.paper.claims import BEFORE
from benchmarks.paper.results import Difference
from tests.cases import every

ROOT = Path(__file__).parents[2]
ALONE = Difference(-0.5, float("inf"), 1)


@every(
    ("published", "ours", "verdict"),
    [
        (-0.02, Difference(-0.3, 0.1, 3), HOLDS),
        (-0.02, Difference(0.3, 0.1, 3), CONTRADICTED),
        (0.02, Difference(0.3, 0.1, 3), HOLDS),
        (0.02, Difference(-0.3, 0.1, 3), CONTRADICTED),
        (-0.02, Difference(-0.05, 0.1, 3), UNDECIDED),
        (-0.02, ALONE, UNDECIDED),
    ],
)
def test_a_sign_needs_the_whole_interval(published: float, ours: Difference, verdict: str) -> None:
    assert signed("", "", published, ours).verdict == verdict


@every(
    ("ours", "verdict"),
    [
        (Difference(-0.003, 0.006, 3), HOLDS),
        (Difference(0.0, 0.02, 3), UNDECIDED),
        (Difference(0.05, 0.03, 3), CONTRADICTED),
        (Difference(0.0, float("inf"), 1), UNDECIDED),
    ],
)
def test_equality_needs_the_whole_interval(ours: Difference, verdict: str) -> None:
    assert equal("", "", 0.0, ours, within=0.01).verdict == verdict


def test_the_readme_and_the_claims_have_one_demos_digits() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    (row,) = [line for line in lines if line.startswith("| loss before the first step")]
    dense, upcycled = re.findall(r"\d+\.\d{6}", row)[:2]
    (claim,) = [claim for claim in BEFORE if claim.command == "make demo"]
    assert claim.ours == f"{dense} and {upcycled}" and dense == upcycled
