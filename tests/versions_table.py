"""Makes benchmarks/versions.md of tests/logs/versions.log: python -m tests.versions_table."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
LOG, PAGE = ROOT / "tests" / "logs" / "versions.log", ROOT / "benchmarks" / "versions.md"
_PAGE = """\
# Megatron-Core from 0.14 to 0.19

    make versions

With every Megatron-Core that is named here, the tests were run of everything that needs neither NeMo nor Megatron-Bridge:
`tests/moe`, `tests/pipeline`, `tests/checkpoint`, `tests/patches` without those of NeMo, and those of the options and the ranks.
It is one case of every claim, as `make test` has it. Each Megatron-Core is in a folder of its own, which hides the installed one; the
folder that is imported is checked. Python 3.11 is the environment of `constraints.txt`, Python 3.12 that of
`constraints-bridge.txt`, which 0.17 and later need. The ranks were on the CPU, over gloo, without Transformer Engine.

| megatron-core | Python | torch | passed | failed | skipped | minutes | date | commit |
|---|---|---|---|---|---|---|---|---|
{rows}

A skipped test is about a defect or an option that other versions have, or needs what only NeMo brings. The durations are those of a
machine that did other work too. `tests/logs/versions.log` has what was printed.
"""


class Row(NamedTuple):
    """What one Megatron-Core did."""

    version: str
    python: str
    torch: str
    passed: int
    failed: int
    skipped: int
    minutes: int
    date: str
    commit: str


def rows(log: str) -> Iterator[Row]:
    """Return one row for each Megatron-Core in the log, in the order of their versions."""
    date = commit = ""
    begun: tuple[str, str, str] | None = None
    found: dict[str, Row] = {}
    for line in log.splitlines():
        if match := re.match(r"(\d{4}-\d\d-\d\d) (\w+(?: with changes)?),", line):
            date, commit = match.groups()
        elif match := re.match(r"megatron-core (\S+), Python (\S+), torch (\S+)$", line):
            begun = (match[1], match[2], match[3])
        elif begun and (seconds := re.search(r"(?:passed|failed|errors?).* in ([\d.]+)s", line)):
            counts = {name: int(number) for number, name in re.findall(r"(\d+) ([a-z]+)", line)}
            failed = sum(counts.get(name, 0) for name in ("failed", "error", "errors"))
            passed, skipped = counts.get("passed", 0), counts.get("skipped", 0)
            minutes = round(float(seconds[1]) / 60)
            found[begun[0]] = Row(*begun, passed, failed, skipped, minutes, date, commit)
            begun = None
    yield from (found[version] for version in sorted(found, key=lambda name: [*map(int, name.split("."))]))


def page(log: str) -> str:
    """Return the page."""
    return _PAGE.format(rows="\n".join(f"| {' | '.join(map(str, row))} |" for row in rows(log)))


if __name__ == "__main__":
    PAGE.write_text(page(LOG.read_text()))
