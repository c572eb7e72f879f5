"""Pass once over a file of a source, for its checksum, NaN and Inf; in sections, if its tensors allow that."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nemo_skymoe.checkpoint.tensors.regions import DTYPE_SIZES, Extent
from nemo_skymoe.durable.checksums import Checksummer, FileChecksum, blocks

_SECTION = 64 << 20
"""Bytes, at least: enough that taking turns costs nothing."""
_FIRST_NONFINITE = {
    "bfloat16": 0x7F80,
    "float16": 0x7C00,
    "float32": 0x7F800000,
    "float64": 0x7FF0000000000000,
    "float8_e4m3fn": 0x7F,
    "float8_e5m2": 0x7C,
}
"""The smallest pattern of bits, without the sign, that is Inf or NaN."""


@dataclass(frozen=True)
class SourceFile:
    """The findings in a file of a source. `nonfinite` has the numbers of NaN and Inf by tensor."""

    checksum: FileChecksum
    nonfinite: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        """Return the findings as a receipt and a journal have them."""
        return self.checksum.to_json() | ({"nonfinite": self.nonfinite} if self.nonfinite else {})

    @staticmethod
    def from_json(value: dict[str, Any]) -> SourceFile:
        """Return the opposite."""
        return SourceFile(FileChecksum.from_json(value), value.get("nonfinite", {}))


def sections(file: Path, extents: Sequence[Extent], known: FileChecksum | None) -> list[tuple[int, int]]:
    """Ranges of a file that can be scanned at the same time.

    A checksum of the whole file needs its bytes in order. One that has each tensor's own is cut between tensors, if
    nothing but tensors follows the first.
    """
    whole = [(0, file.stat().st_size)]
    parts = sorted((part.start, part.start + part.bytes) for part in known.tensors.values()) if known else []
    starts, stops = [start for start, _ in parts], [stop for _, stop in parts]
    if not parts or [*starts[1:], whole[0][1]] != stops:
        return whole
    edges, cuts = {extent.start for extent in extents}, [0]
    for start in starts[1:]:
        if start - cuts[-1] >= _SECTION and start in edges:
            cuts.append(start)
    return list(zip(cuts, [*cuts[1:], stops[-1]], strict=True))


def scan(
    file: Path,
    extents: Sequence[Extent],
    known: FileChecksum | None,
    advance: Callable[[int], None],
    section: tuple[int, int] | None = None,
) -> SourceFile:
    """Return a file's checksum in the parts that `known` has, and its NaN and Inf by tensor; or those of `sections`."""
    first, stop = section or (0, file.stat().st_size)
    parts = [(name, part.start, part.bytes) for name, part in known.tensors.items()] if known else []
    # A tensor without elements may lie at the very end.
    summer = Checksummer([part for part in parts if first <= part[1] < stop + (part[2] == 0)], first)
    nonfinite: dict[str, int] = {}
    remaining = list(reversed(extents))
    edges = [edge for extent in extents for edge in (extent.start, extent.stop)]
    for position, block in blocks(file, edges, (first, stop)):
        summer.update(block)
        while remaining and remaining[-1].stop <= position:
            remaining.pop()
        if remaining and remaining[-1].start <= position:
            count = count_nonfinite(block, remaining[-1].dtype)
            if count:
                nonfinite[remaining[-1].name] = nonfinite.get(remaining[-1].name, 0) + count
        advance(len(block))
    return SourceFile(summer.result(), nonfinite)


def joined(found: Sequence[SourceFile]) -> SourceFile:
    """Return the findings of a whole file from those of `scan` in its sections."""
    checksums = [section.checksum for section in found]
    tensors = {name: part for checksum in checksums for name, part in checksum.tensors.items()}
    nonfinite: dict[str, int] = {}
    for section in found:
        for name, count in section.nonfinite.items():
            nonfinite[name] = nonfinite.get(name, 0) + count
    return SourceFile(FileChecksum(checksums[-1].bytes, checksums[0].sha256, tensors), nonfinite)


def count_nonfinite(data: memoryview, dtype: str) -> int:
    """NaN and Inf among numbers of `dtype`, torch's name; 0 for whole numbers."""
    limit = _FIRST_NONFINITE.get(dtype)
    if limit is None:
        return 0
    size = DTYPE_SIZES[dtype]
    bits = np.frombuffer(data, dtype=f"<u{size}") & (2 ** (8 * size - 1) - 1)
    # A maximum takes a tenth of the time of a count, and nearly every block has none.
    return int((bits >= limit).sum()) if bits.max() >= limit else 0
