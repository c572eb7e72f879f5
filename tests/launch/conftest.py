"""A cluster in the environment, and nothing of this machine's own."""

import io
import sys
from pathlib import Path

import pytest

CLUSTER = {"ACCOUNT": "llm", "PARTITION": "a800", "IMAGE": "/images/skymoe.sqsh", "MOUNTS": "/data:/data", "TIME": "24:00:00"}  # fmt: skip


@pytest.fixture(autouse=True)
def slurm_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from nemo_run import config

    for name, value in CLUSTER.items():
        monkeypatch.setenv(f"SKYMOE_SLURM_{name}", value)
    monkeypatch.setattr(config, "_NEMORUN_HOME", str(tmp_path / "home"))
    # NeMo-Run packages by commands that offer it to type in; pytest's own stdin refuses to be read.
    monkeypatch.setattr(sys, "stdin", io.StringIO())
