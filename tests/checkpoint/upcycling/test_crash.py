"""Upcycling killed at any byte ends, after the same command again, with the bytes of one left alone: every init."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from nemo_skymoe.checkpoint import convert
from nemo_skymoe.checkpoint.convert import TargetOptions
from nemo_skymoe.checkpoint.sources import open_source
from nemo_skymoe.checkpoint.upcycling.options import Upcycling
from nemo_skymoe.checkpoint.verification.verifier import verify
from tests.checkpoint import hf_models
from tests.checkpoint.verification.test_recomputed import INITIALISATIONS
from tests.durable import crash

CHANGING = [options for options in INITIALISATIONS if 0.0 not in options.values()]
initialisations = pytest.mark.parametrize("options", CHANGING, ids=lambda options: options["init"])
targets = pytest.mark.parametrize("to", ["hf", "nemo", "bridge"])


@pytest.fixture
def memory() -> Iterator[Path]:
    """A folder where a sync takes no time: a killed process loses nothing that it wrote, on any file system."""
    with TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        yield Path(folder)


def upcycling(
    folder: Path, options: dict[str, Any], to: str, workers: int = 1
) -> tuple[Callable[[], Any], Path, dict[str, Path]]:
    """A function that upcycles sources in `folder`, where to, and the sources."""
    sources = {"base": folder / "base"}
    hf_models.skywork_dense(folder / "base")
    if options["init"] == "specialized":
        sources["other"] = folder / "other"
        shutil.copytree(folder / "base", folder / "other")
    output = folder / "output"

    def run() -> None:
        opened = {name: open_source(source) for name, source in sources.items()}
        target = TargetOptions(to, shard_bytes=100_000)
        convert.plan(opened, target, Upcycling(4, seed=1, **options)).run(output, workers=workers)

    return run, output, sources


@initialisations
@targets
def test_killed_in_the_middle(options: dict[str, Any], to: str, memory: Path):
    run, output, sources = upcycling(memory, options, to)
    expected = crash.uninterrupted(run, output)
    for byte in crash.evenly(expected.written, 2):
        crash.check(run, output, expected, byte=byte)
    run()
    assert verify(sources, output).problems == []


@targets
def test_shards_and_workers_do_not_change_the_tensors(to: str, memory: Path):
    run, output, _ = upcycling(memory, {"init": "drop", "drop_ratio": 0.5}, to)
    expected = crash.uninterrupted(run, output)
    (memory / "again").mkdir()
    run, output, _ = upcycling(memory / "again", {"init": "drop", "drop_ratio": 0.5}, to, workers=3)
    found = crash.uninterrupted(run, output)
    tensors = {name for name in expected.files if name.endswith((".safetensors", ".distcp"))}
    assert tensors and all(found.files[name] == expected.files[name] for name in tensors)


@initialisations
@targets
@pytest.mark.long
def test_killed_at_a_hundred_bytes(options: dict[str, Any], to: str, memory: Path):
    run, output, _ = upcycling(memory, options, to)
    expected = crash.uninterrupted(run, output)
    for byte in crash.evenly(expected.written, 100):
        crash.check(run, output, expected, byte=byte)
