"""The whole story in twenty steps a phase, through either front door."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.waiting import HANG


def check_told(folder: Path, frontdoor: str) -> None:
    """Run the command, and look at what it printed and at its report."""
    command = [sys.executable, "-m", "nemo_skymoe", "demo", "--quick", "--output", str(folder / "demo")]
    command += ["--frontdoor", frontdoor]
    process = subprocess.run(command, capture_output=True, text=True, timeout=6 * HANG, env=os.environ)
    assert process.returncode == 0, process.stdout + process.stderr
    page = (folder / "demo" / "report" / "report.html").read_text()
    for title in ("Before the first step", "At the end", "Device mesh", "Corpus", "Configuration of the MoE"):
        assert title in page
    first = process.stdout.index("before the first step")
    found = re.findall(r"(dense|nothing dropped)\s*│\s*(\d+\.\d+)", process.stdout[first:])
    losses = {name: float(loss) for name, loss in found[:2]}
    assert losses["dense"] == pytest.approx(losses["nothing dropped"], abs=1e-5)
    pictures = {path.stem for path in (folder / "demo" / "report" / "figures").glob("*.png")}
    assert {"losses", "drop_rate", "gate_ratios", "expert_similarity"} <= pictures
