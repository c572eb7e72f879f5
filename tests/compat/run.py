"""Every supported pair of NeMo and megatron-core in an environment of its own: python -m tests.compat.run [NEMO/CORE ...]

An environment holds what differs from the one that this runs in, which stands behind it; it is made once and reused.
With every pair the table goes to benchmarks/compat.md; with some, named as 2.7.3/0.16.1, to the terminal.
"""

import json
import os
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_skymoe.doctor import PAIRS, TESTED
from tests.compat.table import markdown

ROOT = Path(__file__).parents[2]
LOG = ROOT / "benchmarks" / "compat.md"
TESTS = (
    "tests/patches",
    "tests/nemo/test_moe_training.py",
    "tests/recipes/test_factories.py",
    "tests/recipes/test_toys.py::test_the_experts_have_a_learning_rate_of_their_own_and_both_go_to_zero",
)
BESIDE = {
    "2.5.3": ("nemo_run==0.6.0", "transformers==4.53.3", "tokenizers==0.21.4"),
    "2.6.2": ("nemo_run==0.7.0", "transformers==4.53.3", "tokenizers==0.21.4"),
    "2.7.3": ("nemo_run==0.8.0",),
}
"""Beside the pinned pair: NeMo-Run as NVIDIA's container has it with that NeMo, and what the NeMo itself pins."""
_TRANSFORMERS = "from importlib.metadata import version; print(version('transformers'))"


@dataclass(frozen=True)
class Outcome:
    """The outcome of a pair: what the doctor found and said, the figures of pair.py, pytest's last line."""

    pair: tuple[str, str]
    versions: dict[str, str]
    verdict: str
    patches: list[str]
    found: dict[str, Any]
    tests: str


class Failed(Exception):
    """A step of a pair did not succeed."""


def python_of(pair: tuple[str, str]) -> str:
    """The interpreter of the pair's environment, which is made if it is not there as it should be."""
    if pair == TESTED:
        return sys.executable
    nemo, core = pair
    wanted = [f"nemo-toolkit=={nemo}", f"megatron-core=={core}", *BESIDE[nemo]]
    behind = sysconfig.get_path("purelib")
    folder = ROOT / "build" / "compat" / f"nemo-{nemo}-megatron-core-{core}"
    stamp, contents = folder / "contents", "\n".join([sys.version, behind, *wanted])
    python = str(folder / "bin" / "python")
    if not (stamp.exists() and stamp.read_text() == contents):
        print(f"making {folder.relative_to(ROOT)}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", "--clear", folder], check=True)
        pip = [sys.executable, "-m", "pip", "--python", python, "install", "-qq", "--no-deps"]
        options = ["--disable-pip-version-check", *os.environ.get("PIP_ARGS", "").split()]
        subprocess.run([*pip, *options, *wanted], check=True)
        [own] = folder.glob("lib/python3.*/site-packages")
        # After its own packages come the others', with their .pth files: modules and metadata are found in this order.
        (own / "zz_behind.pth").write_text(f"import site; site.addsitedir({behind!r})\n")
        stamp.write_text(contents)
    return python


def step(name: str, *command: str) -> str:
    """Return what a command prints.

    Raises:
        Failed: It did not end with 0; what it printed is in the message.
    """
    print(f"  {name}", flush=True)
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if ended.returncode:
        raise Failed(f"{name} ended with {ended.returncode}\n{ended.stdout[-6000:]}\n{ended.stderr[-6000:]}")
    return ended.stdout


def outcome(pair: tuple[str, str], scratch: Path) -> Outcome:
    """Everything that is tried of a pair.

    Raises:
        Failed: Something of it did not succeed.
    """
    python = python_of(pair)
    print(f"NeMo {pair[0]} with megatron-core {pair[1]}", flush=True)
    seen = json.loads(step("doctor", python, "-m", "nemo_skymoe", "doctor", "--json"))
    versions = {row["name"]: row["version"] for row in seen["rows"]}
    if (versions["nemo-toolkit"], versions["megatron-core"]) != pair:
        raise Failed(f"the environment of {pair} has {versions}")
    versions["transformers"] = step("transformers", python, "-c", _TRANSFORMERS).strip()
    figures = scratch / "figures.json"
    step("imports, dry runs, training", python, "-m", "tests.compat.pair", str(figures))
    tests = step("tests", python, "-m", "pytest", "-p", "no:cacheprovider", "-m", "not long", *TESTS)
    single = [patch["name"] for patch in seen["patches"] if "." not in patch["name"]]
    return Outcome(
        pair,
        versions,
        seen["verdict"]["sentence"],
        single,
        json.loads(figures.read_text()),
        tests.strip().splitlines()[-1],
    )


def main(chosen: list[str]) -> int:
    pairs = [pair for pair in PAIRS if not chosen or "/".join(pair) in chosen]
    if unknown := set(chosen) - {"/".join(pair) for pair in pairs}:
        print(
            f"{', '.join(unknown)}: expected some of {', '.join('/'.join(p) for p in PAIRS)}", file=sys.stderr
        )
        return 2
    scratch = ROOT / "build" / "compat"
    scratch.mkdir(parents=True, exist_ok=True)
    outcomes, failed = [], 0
    for pair in pairs:
        try:
            outcomes.append(outcome(pair, scratch))
        except Failed as failure:
            failed += 1
            print(failure, file=sys.stderr)
    table = markdown(outcomes, TESTED) if outcomes else ""
    if failed or chosen:
        print(table)
    else:
        LOG.write_text(table)
        print(LOG.relative_to(ROOT))
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
