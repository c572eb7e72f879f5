"""The demo: its folder, and the whole story in twenty steps a phase."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.demo import story
from tests.waiting import HANG


def test_refuses_a_folder_with_other_files(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    with pytest.raises(ConfigurationError, match="holds other files"):
        story.run(tmp_path)
    assert (tmp_path / "logs").is_dir()


@pytest.mark.long
def test_the_whole_story_quickly(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "nemo_skymoe", "demo", "--quick", "--output", str(tmp_path / "demo")]
    process = subprocess.run(command, capture_output=True, text=True, timeout=6 * HANG, env=os.environ)
    assert process.returncode == 0, process.stdout + process.stderr
    page = (tmp_path / "demo" / "report" / "report.html").read_text()
    for title in ("Before the first step", "At the end", "Device mesh", "Corpus"):
        assert title in page
    first = process.stdout.index("before the first step")
    found = re.findall(r"(dense|nothing dropped)\s*│\s*(\d+\.\d+)", process.stdout[first:])
    losses = {name: float(loss) for name, loss in found[:2]}
    assert losses["dense"] == pytest.approx(losses["nothing dropped"], abs=1e-5)
    pictures = {path.stem for path in (tmp_path / "demo" / "report" / "figures").glob("*.png")}
    assert {"losses", "drop_rate", "gate_ratios", "expert_similarity"} <= pictures
