"""A job that is run again: it finds what it has written, and takes nothing else for it."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nemo_skymoe.checkpoint.job.conversion import run
from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.durable.receipt import RECEIPT
from tests.checkpoint.fakes import random_weights
from tests.checkpoint.simple_formats import JOB, TINY, Interrupting, flip, open_folder, target, write
from tests.durable import crash


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
    lists = (receipt["sources"][0]["files"], receipt["files"])
    everything = sum(file["bytes"] for files in lists for file in files.values())
    assert done[-1][0] == done[-1][1] == pytest.approx(everything, rel=0.03)


def test_an_output_of_other_options_is_refused_by_the_first_that_differs(tmp_path: Path) -> None:
    write("hf", random_weights(TINY), tmp_path / "source")
    upcycling = {"num_experts": 16, "init": "copy"}
    convert("hf", tmp_path, job=JOB | {"upcycling": upcycling})
    for other, reason in (
        (
            JOB | {"upcycling": upcycling | {"num_experts": 8}},
            "num_experts 16, and this command has 8",
        ),
        (JOB | {"upcycling": None}, "num_experts 16, and this command has None"),
        (JOB | {"upcycling": upcycling, "command": "another"}, "another command or version wrote it"),
    ):
        with pytest.raises(ConfigurationError, match=f"this command's own, but .*({reason})"):
            convert("hf", tmp_path, job=other)


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


def shorten(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def flip_last(file: Path) -> None:
    flip(file, file.stat().st_size - 1)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "is missing": Path.unlink,
    "bytes, expected": shorten,
    "not the bytes": flip_last,
}


@pytest.mark.parametrize("to", ["hf", "hf in one file", "torch_dist"])
def test_a_damaged_file_is_refused_by_name_and_written_again_on_demand(to: str, tmp_path: Path) -> None:
    weights, output = random_weights(TINY), tmp_path / "out"
    made = target(to.split()[0], weights, 10**9 if "one" in to else 4000)
    write("hf", weights, tmp_path / "source")
    read, storage = open_folder("hf", tmp_path / "source")

    def convert(repair: bool = True) -> dict[str, str]:
        found: dict[str, str] = {}
        job: dict[str, Any] = {"job": JOB, "sources": [storage], "on_damage": found.update, "workers": 2}
        run(read, made, output, repair=repair, **job)
        return found

    assert convert(repair=False) == {}
    expected = crash.tree(output)
    names = sorted(expected.keys() - {RECEIPT})
    assert len(names) == {"hf": 10, "hf in one file": 3, "torch_dist": 19}[to], names
    for name in names:
        for reason, damage in DAMAGES.items():
            before = times(output)
            damage(output / name)
            left = times(output)
            with pytest.raises(
                ConfigurationError, match=f"/{re.escape(name)}' .*{reason}.* --repair writes that"
            ):
                convert(repair=False)
            assert times(output) == left
            found = convert()
            assert found.keys() == {name} and reason in found[name], (name, found)
            assert crash.tree(output) == expected, name
            files = {path for path in before if path.is_file()}
            touched = {path for path in files if path.stat().st_mtime_ns != before[path]}
            assert touched == {output / name}
    shutil.rmtree(output / Path(names[-1]).parts[0], ignore_errors=True)  # a folder, or several files at once
    (output / names[0]).unlink(missing_ok=True)
    assert names[0] in convert()
    assert crash.tree(output) == expected and convert() == {}
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".unfinished"] == []


def test_a_receipt_that_is_wrong_about_an_intact_file_is_corrected(tmp_path: Path) -> None:
    write("hf", random_weights(TINY), tmp_path / "source")
    convert("hf", tmp_path)
    expected = crash.tree(tmp_path / "out")
    for name in json.loads(expected[RECEIPT])["files"]:
        receipt = json.loads(expected[RECEIPT])
        digest = receipt["files"][name]["sha256"]
        receipt["files"][name]["sha256"] = ("0" if digest[0] != "0" else "1") + digest[1:]
        (tmp_path / "out" / RECEIPT).write_text(json.dumps(receipt))
        convert("hf", tmp_path, repair=True)
        assert crash.tree(tmp_path / "out") == expected, name


def test_a_repair_that_is_killed_is_repeated(tmp_path: Path) -> None:
    write("hf", random_weights(TINY), tmp_path / "source")
    convert("hf", tmp_path)
    expected = crash.tree(tmp_path / "out")
    damaged = sorted((tmp_path / "out").glob("model-*"))[:2]
    for file in damaged:
        flip_last(file)
    for byte in (1, 700, 5000):
        crash.attempt(lambda: convert("hf", tmp_path, repair=True), byte=byte)
    convert("hf", tmp_path, repair=True)
    assert crash.tree(tmp_path / "out") == expected


def test_the_same_source_by_another_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write("hf", random_weights(TINY), tmp_path / "source")
    (tmp_path / "link").symlink_to("source")
    (tmp_path / "beside").mkdir()
    (tmp_path / "files").mkdir()
    for file in (tmp_path / "source").iterdir():
        (tmp_path / "files" / file.name).symlink_to(file)
    monkeypatch.chdir(tmp_path)
    spellings = ["source", "./source/", "link", "beside/../source", str(tmp_path / "source"), "files"]

    def convert(spelling: str, output: Path, **interruption: Any) -> dict[str, str]:
        weights, storage = open_folder("hf", Path(spelling))
        if interruption:
            weights = Interrupting(random_weights(TINY), **interruption)
        made = target("torch_dist", weights)
        found: dict[str, str] = {}
        run(weights, made, output, job=JOB, sources=[storage], on_damage=found.update)
        return found

    convert("source", tmp_path / "out")
    expected = crash.tree(tmp_path / "out")
    for number, spelling in enumerate(spellings):
        assert convert(spelling, tmp_path / "out") == {}
        output = tmp_path / str(number)
        with pytest.raises(KeyboardInterrupt):
            convert(spelling, output, reads=8, what=KeyboardInterrupt())
        convert(spellings[number - 1], output)
        found = crash.tree(output)
        beside = set() if "files" not in (spelling, spellings[number - 1]) else {RECEIPT}
        assert [name for name in expected if found[name] != expected[name] and name not in beside] == []
