"""The receipt of a finished output that is missing, damaged or edited: named, and on demand put back."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nemo_skymoe.checkpoint.job.conversion import run
from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.durable.receipt import RECEIPT
from tests.checkpoint.fakes import random_weights
from tests.checkpoint.simple_formats import JOB, TINY, flip, open_folder, target, write
from tests.durable import crash


@pytest.fixture(params=["hf", "torch_dist"])
def out(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A finished output of this format."""
    write("hf", random_weights(TINY), tmp_path / "source")
    convert(tmp_path / request.param)
    return tmp_path / request.param


def convert(output: Path, **options: Any) -> dict[str, str]:
    """Run the job, whose format is the output's name; the files that were written again."""
    weights, storage = open_folder("hf", output.parent / "source")
    told: dict[str, str] = {}
    format = output.name.partition(" ")[0]
    run(
        weights, target(format, weights), output, job=JOB, sources=[storage], on_damage=told.update, **options
    )
    return told


def edit(receipt: Path) -> None:
    receipt.write_text(json.dumps(json.loads(receipt.read_text())))


LOSSES: dict[str, Callable[[Path], None]] = {
    "it has no skymoe_receipt.json .*--repair puts it back": Path.unlink,
    "is damaged: .*--repair puts it back": lambda receipt: receipt.write_bytes(receipt.read_bytes()[:-40]),
    "is damaged: .* with --repair puts it back": lambda receipt: receipt.write_bytes(b""),
    "is not as it was written: .*--repair writes that file again": edit,
}


def test_it_is_put_back_on_demand_alone(out: Path) -> None:
    expected = crash.tree(out)
    for message, lose in LOSSES.items():
        lose(out / RECEIPT)
        left = crash.tree(out)
        with pytest.raises(ConfigurationError, match=message):
            convert(out)
        assert crash.tree(out) == left
        files = {file: file.stat().st_ino for file in out.rglob("*") if file.name != RECEIPT}
        assert convert(out, repair=True).keys() == {RECEIPT}
        assert crash.tree(out) == expected and convert(out) == {}
        assert files == {file: file.stat().st_ino for file in out.rglob("*") if file.name != RECEIPT}
    assert [path for path in out.parent.iterdir() if path.suffix == ".unfinished"] == []


def test_what_is_missing_beside_it_comes_back_too(out: Path) -> None:
    expected = crash.tree(out)
    names = sorted(expected.keys() - {RECEIPT})
    for name in (RECEIPT, names[0], names[-1]):
        (out / name).unlink()
    assert convert(out, repair=True).keys() == {RECEIPT, names[0], names[-1]}
    assert crash.tree(out) == expected


def test_without_it_nothing_that_differs_is_touched(out: Path) -> None:
    """It may be anybody's: no receipt says that it was written here."""
    expected = crash.tree(out)
    (out / RECEIPT).unlink()
    name = sorted(expected.keys() - {RECEIPT})[1]
    flip(out / name, -1)
    left = crash.tree(out)
    with pytest.raises(
        ConfigurationError, match=f"differs from what .*/{name}' is .*; move what differs away"
    ):
        convert(out, repair=True)
    assert crash.tree(out) == left
    (out / name).unlink()
    assert convert(out, repair=True).keys() == {RECEIPT, name}
    assert crash.tree(out) == expected


def test_nothing_is_put_into_a_folder_that_no_command_here_wrote(out: Path) -> None:
    for place in (out.parent / f"{out.name} foreign", out.parent / f"{out.name} empty"):
        place.mkdir()
    (out.parent / f"{out.name} foreign" / "thesis.txt").write_text("chapter 1")
    (out.parent / f"{out.name} file").write_text("no folder")
    for kind in ("foreign", "empty", "file"):
        with pytest.raises(ConfigurationError, match="exists: expected a new folder"):
            convert(out.parent / f"{out.name} {kind}", repair=True)
    assert [*(out.parent / f"{out.name} foreign").iterdir()] == [
        out.parent / f"{out.name} foreign/thesis.txt"
    ]
    with pytest.raises(ConfigurationError, match=r"there is no '.*nowhere' to repair: leave --repair out"):
        convert(out.parent / f"{out.name} nowhere", repair=True)


def test_a_repair_that_is_killed_is_repeated(out: Path) -> None:
    expected = crash.tree(out)
    name = sorted(expected.keys() - {RECEIPT})[0]
    shutil.copytree(out, out.parent / "whole")
    for byte in (1, 3000, 9000, 20000):
        (out / RECEIPT).unlink(missing_ok=True)
        (out / name).unlink(missing_ok=True)
        crash.attempt(lambda: convert(out, repair=True), byte=byte)
        assert all(crash.tree(out)[left] == expected[left] for left in crash.tree(out))
    if not (out / RECEIPT).exists():
        convert(out, repair=True)
    assert crash.tree(out) == expected
