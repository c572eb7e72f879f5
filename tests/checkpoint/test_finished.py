"""A job that is run again: it finds what it has written, and takes nothing else for it."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fakes import random_weights
from simple_formats import JOB, TINY, flip, open_folder, target, write

from nemo_skymoe.checkpoint.job import run
from nemo_skymoe.checkpoint.receipt import RECEIPT
from nemo_skymoe.config import ConfigurationError


@pytest.fixture(params=["hf", "torch_dist"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def convert(kind: str, folder: Path, **options: Any) -> dict[str, Any]:
    weights, storage = open_folder(kind, folder / "source")
    return run(weights, target("hf", weights), folder / "out", sources=[storage], **{"job": JOB, **options})


def times(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_the_same_job_finds_its_output(kind: str, tmp_path: Path) -> None:
    write(kind, random_weights(TINY), tmp_path / "source")
    receipt, before, done = convert(kind, tmp_path), times(tmp_path), []
    assert convert(kind, tmp_path, progress=lambda *progress: done.append(progress)) == receipt
    assert times(tmp_path) == before
    read = sum(file["bytes"] for file in receipt["sources"][0]["files"].values())
    assert done[-1][0] == read > 0


def of_another_seed(kind: str, folder: Path) -> None:
    shutil.rmtree(folder / "source")
    write(kind, random_weights(TINY, seed=1), folder / "source")


CHANGES: dict[str, Callable[[str, Path], None]] = {
    "another source": of_another_seed,
    "no receipt": lambda kind, folder: (folder / "out" / RECEIPT).unlink(),
    "a file of somebody else": lambda kind, folder: (shutil.rmtree(folder / "out"), (folder / "out").touch())[
        1
    ],
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_has_changed_is_refused(change: str, kind: str, tmp_path: Path) -> None:
    write(kind, random_weights(TINY), tmp_path / "source")
    convert(kind, tmp_path)
    CHANGES[change](kind, tmp_path)
    before = times(tmp_path)
    with pytest.raises(ConfigurationError, match="out' exists: expected a new folder"):
        convert(kind, tmp_path)
    assert times(tmp_path) == before


def test_another_job_is_refused(kind: str, tmp_path: Path) -> None:
    write(kind, random_weights(TINY), tmp_path / "source")
    convert(kind, tmp_path)
    with pytest.raises(ConfigurationError, match="out' exists: expected a new folder"):
        convert(kind, tmp_path, job={**JOB, "seed": 8})


def test_a_bit_of_the_source_is_noticed(tmp_path: Path) -> None:
    write("hf", random_weights(TINY), tmp_path / "source")
    convert("hf", tmp_path)
    file = next((tmp_path / "source").glob("model*.safetensors"))
    flip(file, file.stat().st_size - 1)
    with pytest.raises(ConfigurationError, match="out' exists: expected a new folder"):
        convert("hf", tmp_path)
