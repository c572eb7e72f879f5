"""Small and large files that are there whole or not at all."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import pytest

from nemo_skymoe.durable.files import move, sync, write_small, write_whole
from tests.cases import every

BEFORE, AFTER = b"before", bytes(range(256)) * 1000


def write_in_pieces(path: Path, data: bytes) -> None:
    def write(file: BinaryIO) -> None:
        for start in range(0, len(data), 1000):
            file.write(data[start : start + 1000])

    write_whole(path, write)


writers = every("write", [write_small, write_in_pieces])


@writers
def test_a_file_is_written_synced_and_only_then_named(
    write: Callable[[Path, bytes], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path, events = tmp_path / "file", []
    path.write_bytes(BEFORE)
    fsync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        fsync(descriptor)
        events.append(("synced", os.fstat(descriptor).st_size, path.read_bytes()))

    def named(*arguments: Path) -> None:
        replace(*arguments)
        events.append(("named", path.stat().st_size, path.read_bytes()))

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", named)
    write(path, AFTER)
    assert events == [("synced", len(AFTER), BEFORE), ("named", len(AFTER), AFTER)]
    assert os.listdir(tmp_path) == ["file"]


@writers
def test_what_cannot_be_written_leaves_the_old_file(
    write: Callable[[Path, bytes], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    (tmp_path / "file").write_bytes(BEFORE)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="full"):
        write(tmp_path / "file", AFTER)
    assert (tmp_path / "file").read_bytes() == BEFORE
    assert os.listdir(tmp_path) == ["file"]


@every("elsewhere", [False, True])
def test_a_file_moves_to_another_disk_too(elsewhere: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_bytes(AFTER)
    replace = os.replace

    def two_disks(source: Path, place: Path) -> None:
        if elsewhere and Path(source).parent != Path(place).parent:
            raise OSError(errno.EXDEV, "another disk")
        replace(source, place)

    (tmp_path / "other").mkdir()
    monkeypatch.setattr(os, "replace", two_disks)
    move(tmp_path / "file", tmp_path / "other" / "file")
    assert (tmp_path / "other" / "file").read_bytes() == AFTER
    assert os.listdir(tmp_path / "other") == ["file"]


def test_a_sync_reaches_files_and_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").touch()
    seen: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: seen.append(os.fstat(descriptor).st_ino))
    sync(tmp_path / "file")
    sync(tmp_path)
    assert seen == [(tmp_path / "file").stat().st_ino, tmp_path.stat().st_ino]
