"""Sources: damage, NaN and changes that are found before or while they are converted, and the receipt's account."""

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_skymoe.checkpoint.tensors.model import Key
from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.durable.receipt import RECEIPT, read_receipt
from tests.checkpoint.fakes import random_weights
from tests.checkpoint.simple_formats import JOB, TINY, Interrupting, flip, open_folder, write
from tests.durable import crash


def nothing_there(output: Path) -> bool:
    return not output.exists() and not output.with_name(output.name + ".unfinished").exists()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write("hf", random_weights(TINY), tmp_path / "source")
    return tmp_path / "source"


def convert(folder: Path, **options: Any) -> dict[str, Any]:
    weights, storage = open_folder("hf", folder)
    return write("torch_dist", weights, folder.parent / "out", [storage], **options)


@pytest.mark.parametrize("position", [-1, -900])
def test_a_flipped_bit_is_found_by_the_source_s_own_receipt(position: int, source: Path):
    flip(source / "model-00003-of-00007.safetensors", position)
    with pytest.raises(ConfigurationError, match=r"00003-of-00007.safetensors' is damaged: the sha256 of '"):
        convert(source)
    assert nothing_there(source.parent / "out")


@pytest.mark.parametrize("style", ["sums", "sums-binary", "sidecar", "cache", "download"])
def test_a_flipped_bit_is_found_by_other_checksums(style: str, source: Path):
    (source / RECEIPT).unlink()
    name = "model-00003-of-00007.safetensors"
    file = source / name
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    if style == "sums":
        (source / "SHA256SUMS").write_text(f"{'0' * 64}  other\n{sha256}  {name}\n")
    elif style == "sums-binary":
        (source / "sha256sums.txt").write_text(f"{sha256.upper()} *./{name}\n")
    elif style == "sidecar":
        (source / f"{name}.sha256").write_text(f"{sha256}  {name}\n")
    elif style == "cache":
        (source.parent / "blobs").mkdir()
        snapshot = source.parent / "snapshots" / "abc"
        snapshot.parent.mkdir()
        source = source.rename(snapshot)
        file = (snapshot / name).rename(source.parent.parent / "blobs" / sha256)
        (snapshot / name).symlink_to(file)
    else:
        record = source / ".cache" / "huggingface" / "download" / f"{name}.metadata"
        record.parent.mkdir(parents=True)
        record.write_text(f"{'a' * 40}\n{sha256}\n1700000000.0\n")
    convert(source, job={"attempt": 1})
    (source.parent / "out").rename(source.parent / "intact")
    flip(file, -1)
    with pytest.raises(ConfigurationError, match="is damaged: its sha256 is"):
        convert(source)
    assert nothing_there(source.parent / "out")


def test_nan_and_inf_are_refused_or_counted(tmp_path: Path):
    weights = random_weights(TINY, torch.bfloat16)
    weights.values[Key("gate", 0, 1)][3, 4:6] = torch.inf
    weights.values[Key("router", 0)][0, 0] = -torch.nan
    write("hf", weights, tmp_path / "source")
    with pytest.raises(
        ConfigurationError, match=r"NaN or Inf .*'router.0' in .* has 1; 'gate.0.1' in .* has 2"
    ):
        convert(tmp_path / "source")
    assert nothing_there(tmp_path / "out")
    (source,) = convert(tmp_path / "source", allow_nonfinite=True)["sources"]
    counts = [file["nonfinite"] for file in source["files"].values() if "nonfinite" in file]
    assert {name: count for each in counts for name, count in each.items()} == {"router.0": 1, "gate.0.1": 2}


def test_another_source_does_not_finish_what_one_began(source: Path, monkeypatch: pytest.MonkeyPatch):
    """Same names, shapes and options: nothing but the source would tell the halves apart."""
    _, storage = open_folder("hf", source)
    interrupting: Any = Interrupting(random_weights(TINY), 8, KeyboardInterrupt())
    output = source.parent / "out"
    with pytest.raises(KeyboardInterrupt):
        write("torch_dist", interrupting, output, [storage])
    shutil.copytree(source, source.parent / "other")
    others, other_storage = open_folder("hf", source.parent / "other")
    begun = crash.tree(output.with_name("out.unfinished"))
    with pytest.raises(
        ConfigurationError, match=r"begun from other sources, '.*/source/model-0.*' among them"
    ):
        write("torch_dist", others, output, [other_storage])
    assert crash.tree(output.with_name("out.unfinished")) == begun
    monkeypatch.chdir(source.parent)
    weights, storage = open_folder("hf", Path("source"))
    write("torch_dist", weights, output, [storage])


def test_a_source_that_changes_between_two_attempts_is_refused(source: Path):
    weights, storage = open_folder("hf", source)
    interrupting: Any = Interrupting(random_weights(TINY), 8, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        write("torch_dist", interrupting, source.parent / "out", [storage])
    (source / RECEIPT).unlink()
    flip(source / "model-00003-of-00007.safetensors", -1)
    with pytest.raises(ConfigurationError, match=r"has changed since .* was begun: delete that folder"):
        write("torch_dist", weights, source.parent / "out", [storage])


def test_a_source_that_changes_while_it_is_converted_is_refused(source: Path):
    _, storage = open_folder("hf", source)
    shard = source / "model-00007-of-00007.safetensors"
    changing: Any = Interrupting(random_weights(TINY), 8, lambda: os.utime(shard, ns=(1, 1)))
    with pytest.raises(
        ConfigurationError, match=r"00007-of-00007.safetensors' changed while it was converted"
    ):
        write("torch_dist", changing, source.parent / "out", [storage])
    assert not (source.parent / "out").exists()


def test_an_unchanged_source_is_not_read_again(source: Path, monkeypatch: pytest.MonkeyPatch):
    weights, storage = open_folder("hf", source)
    interrupting: Any = Interrupting(random_weights(TINY), 8, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        write("torch_dist", interrupting, source.parent / "out", [storage])
    monkeypatch.setattr("nemo_skymoe.checkpoint.job.source_check.scan", lambda *_: pytest.fail("read again"))
    write("torch_dist", weights, source.parent / "out", [storage])


def test_the_receipt_says_what_was_made_of_what(source: Path):
    receipt = convert(source)
    assert receipt == read_receipt(source.parent / "out")
    assert receipt["job"] == JOB
    (listed,) = receipt["sources"]
    assert listed["folder"] == str(source)
    assert listed["files"].keys() == {f"model-0000{n}-of-00007.safetensors" for n in range(1, 8)} | {
        "model.safetensors.index.json"
    }
    files = crash.tree(source.parent / "out")
    assert receipt["files"].keys() == files.keys() - {RECEIPT}
    for name, checksum in receipt["files"].items():
        assert checksum["bytes"] == len(files[name])
        rest = bytearray(files[name])
        for start, size, sha256 in reversed(checksum.get("tensors", {}).values()):
            data = files[name][start : start + size]
            assert hashlib.sha256(data).hexdigest() == sha256
            del rest[start : start + size]
        assert hashlib.sha256(rest).hexdigest() == checksum["sha256"]


@pytest.mark.parametrize(
    "data",
    [b"", b"[]", b"{}", b'{"receipt": 2}', b'{"receipt": 1, "job": {}, "sources": [], "files": {"a": 1}}'],
)
def test_a_damaged_receipt_is_refused(data: bytes, source: Path):
    (source / RECEIPT).write_bytes(data)
    with pytest.raises(ConfigurationError, match=r"skymoe_receipt.json' is damaged"):
        convert(source)
