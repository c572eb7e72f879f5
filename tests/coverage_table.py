"""Print which share of every package's lines the tests run: python -m tests.coverage_table, after `make test`."""

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

REPORT = Path("build/coverage/lines.json")


def table(files: Mapping[str, Any]) -> str:
    """Return a line per package, and one for all of them.

    Args:
        files: The `files` of coverage's JSON report: path to a `summary` with `num_statements` and `covered_lines`.
    """
    statements: Counter[str] = Counter()
    covered: Counter[str] = Counter()
    for path, report in files.items():
        summary = report["summary"]
        for package in (str(Path(path).parent), "together"):
            statements[package] += summary["num_statements"]
            covered[package] += summary["covered_lines"]
    packages = [*sorted(statements.keys() - {"together"}), "together"]
    return "\n".join(
        f"{package:<45} {statements[package]:>6} statements {covered[package] / max(statements[package], 1):>7.1%} covered"
        for package in packages
    )


def main() -> None:
    """Write coverage's report of the last run, and print it by package."""
    subprocess.run(
        [sys.executable, "-m", "coverage", "json", "-q", "--ignore-errors", "-o", str(REPORT)], check=True
    )
    print(table(json.loads(REPORT.read_text())["files"]))


if __name__ == "__main__":
    main()
