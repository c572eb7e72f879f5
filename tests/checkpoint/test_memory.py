"""Peak memory of a fresh process does not grow with the checkpoint."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint import hf_models

MEGABYTE = 1 << 20
SIZES = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 4}
CHILD = """
import json, sys
from pathlib import Path
from nemo_skymoe.checkpoint import convert
from nemo_skymoe.checkpoint.sources import open_source
from nemo_skymoe.checkpoint.convert import TargetOptions
from nemo_skymoe.checkpoint.upcycling.options import Upcycling
source, output, to, options = json.loads(sys.argv[1])
opened = {"base": open_source(Path(source))}
convert.plan(opened, TargetOptions(to), None if options is None else Upcycling(16, **options)).run(Path(output))
print(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
"""


def peak(source: Path, output: Path, to: str, options: dict[str, Any] | None) -> int:
    """Largest resident memory of a process that does nothing else, bytes."""
    command = [sys.executable, "-c", CHILD, json.dumps([str(source), str(output), to, options])]
    return 1024 * int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.long
@pytest.mark.parametrize("to", ["hf", "nemo"])
@pytest.mark.parametrize(
    "options", [{"init": "copy"}, {"init": "drop", "drop_ratio": 0.5}, {"init": "granular", "granularity": 2}]
)
def test_no_slope(options: dict[str, Any], to: str, tmp_path: Path):
    peaks, sizes = [], []
    for layers in (3, 8):  # with fewer the work ends before all of its memory is in use
        source, moe, back = (tmp_path / f"{name}{layers}" for name in ("dense", "moe", "back"))
        hf_models.skywork_dense(source, num_hidden_layers=layers, **SIZES)
        peaks.append(
            (
                peak(source, moe, to, options),
                peak(moe, back, "nemo" if to == "hf" else "hf", None),
            )
        )
        sizes.append(sum(path.stat().st_size for path in moe.rglob("*") if path.is_file()))
    grown = sizes[1] - sizes[0]
    assert grown > 480 * MEGABYTE
    for small, large in zip(*peaks, strict=True):
        assert large - small < grown / 20
