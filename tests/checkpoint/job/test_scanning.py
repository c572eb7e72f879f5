"""A file that is scanned in sections is found to be what it is as a whole."""

from itertools import pairwise
from pathlib import Path
from random import Random

import numpy as np
import pytest

from nemo_skymoe.checkpoint.job import scanning
from nemo_skymoe.checkpoint.job.scanning import joined, scan, sections
from nemo_skymoe.checkpoint.tensors.regions import Extent
from nemo_skymoe.durable import checksums
from nemo_skymoe.durable.checksums import Checksummer, FileChecksum


def made(file: Path, random: Random, tail: int = 0) -> tuple[list[Extent], FileChecksum]:
    """A file of a header, tensors with some NaN, and `tail` bytes; where they are, and their checksums."""
    sizes = [random.choice((0, 4, 40, 120)) for _ in range(8)]
    values = np.ones(sum(sizes), "<f4")
    values[random.sample(range(len(values)), min(3, len(values)))] = np.nan
    data = bytes(13) + values.tobytes() + bytes(tail)
    file.write_bytes(data)
    edges = [13 + 4 * sum(sizes[:number]) for number in range(len(sizes) + 1)]
    spans = list(pairwise(edges))
    summer = Checksummer([(f"{number}", a, b - a) for number, (a, b) in enumerate(spans)])
    summer.update(memoryview(data))
    return [Extent(f"{number}", "float32", a, b) for number, (a, b) in enumerate(spans)], summer.result()


def test_sections_are_joined_to_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(scanning, "_SECTION", 300)
    monkeypatch.setattr(checksums, "BLOCK", 64)
    file, random, counts = tmp_path / "file", Random(3), []
    for _ in range(50):
        extents, known = made(file, random)
        cut = sections(file, extents, known)
        read: list[int] = []
        found = joined([scan(file, extents, known, read.append, section) for section in cut])
        assert found == scan(file, extents, known, lambda _: None)
        assert found.checksum == known
        assert sum(read) == file.stat().st_size
        counts.append(len(cut))
    assert max(counts) >= 4


def test_a_file_is_whole_where_its_order_matters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(scanning, "_SECTION", 1)
    file = tmp_path / "file"
    extents, known = made(file, Random(1), tail=5)
    whole = [(0, file.stat().st_size)]
    assert sections(file, extents, None) == whole
    assert sections(file, extents, FileChecksum(known.bytes, known.sha256)) == whole
    assert sections(file, extents, known) == whole, "bytes of no tensor at the end"
    extents, known = made(file, Random(1))
    assert len(sections(file, extents, known)) > 1
    assert sections(file, [], known) == [(0, known.bytes)], "checksums of parts that are no tensors"
