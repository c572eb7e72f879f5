"""Checksums of files in parts: every byte is in exactly one, wherever blocks end."""

import hashlib
from pathlib import Path
from random import Random

import pytest

from nemo_skymoe.durable import checksums
from nemo_skymoe.durable.checksums import (
    Checksummer,
    FileChecksum,
    TensorChecksum,
    blocks,
    found_checksums,
)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_every_byte_is_in_one_checksum():
    random = Random(2)
    for _ in range(100):
        data = random.randbytes(random.randrange(1, 200))
        edges = sorted(random.choices(range(len(data) + 1), k=2 * random.randrange(4)))
        tensors = [(f"{i}", a, b - a) for i, (a, b) in enumerate(zip(edges[::2], edges[1::2], strict=True))]
        summer, position = Checksummer(tensors), 0
        while position < len(data):
            size = random.randrange(1, 50)
            summer.update(memoryview(data)[position : position + size])
            position += size
        rest = bytearray(data)
        for _, start, size in reversed(tensors):
            del rest[start : start + size]
        parts = {
            n: TensorChecksum(start, size, sha256(data[start : start + size])) for n, start, size in tensors
        }
        assert summer.result() == FileChecksum(len(data), sha256(bytes(rest)), parts)
        assert FileChecksum.from_json(summer.result().to_json()) == summer.result()


def test_blocks_end_at_the_cuts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(checksums, "BLOCK", 10)
    file = tmp_path / "file"
    file.write_bytes(bytes(range(100)))
    found = [(position, bytes(block)) for position, block in blocks(file, [0, 7, 7, 31, 100, 400])]
    assert b"".join(block for _, block in found) == file.read_bytes()
    assert [position for position, _ in found][:7] == [0, 7, 17, 27, 31, 41, 51]


def test_files_are_found_as_they_are(tmp_path: Path):
    contents = {"good": b"abc" * 100, "damaged": b"abd" * 100, "short": b"abc" * 99}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    good, read = FileChecksum.of(contents["good"]), []
    files = {name: tmp_path / name for name in [*contents, "missing"]}
    found = found_checksums(files, dict.fromkeys(files, good), lambda *done: read.append(done))
    assert found == {
        "good": good,
        "damaged": FileChecksum.of(contents["damaged"]),
        "short": None,
        "missing": None,
    }
    assert sorted(read) == [(300, "damaged"), (300, "good")]
