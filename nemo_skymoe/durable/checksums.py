"""Checksums of files. Every byte is covered once: those of a tensor by its own checksum, and the rest by the file's."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_skymoe.durable.errors import CheckpointError
from nemo_skymoe.durable.pool import in_threads
from nemo_skymoe.durable.reading import are_sizes, read_into

BLOCK = 1 << 20
_HEXADECIMAL = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class TensorChecksum:
    """Checksum of the `bytes` bytes from `start` of the file on."""

    start: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class FileChecksum:
    """Checksum of a file of `bytes` bytes. `sha256` covers the bytes outside its `tensors`.

    Without tensors it is the usual checksum of the file.
    """

    bytes: int
    sha256: str
    tensors: Mapping[str, TensorChecksum] = field(default_factory=dict)

    @staticmethod
    def of(data: bytes) -> FileChecksum:
        """Return the checksum of a whole file's content."""
        return FileChecksum(len(data), hashlib.sha256(data).hexdigest())

    def to_json(self) -> dict[str, Any]:
        """Return the checksum as a receipt and a journal have it."""
        tensors = {name: [part.start, part.bytes, part.sha256] for name, part in self.tensors.items()}
        return {"bytes": self.bytes, "sha256": self.sha256} | ({"tensors": tensors} if tensors else {})

    @staticmethod
    def from_json(value: Any) -> FileChecksum:
        """Read what `to_json` made, and raise ValueError for anything else."""
        try:
            tensors = {str(name): TensorChecksum(*part) for name, part in value.get("tensors", {}).items()}
            checksum = FileChecksum(value["bytes"], value["sha256"], tensors)
            parts = sorted((part.start, part.start + part.bytes) for part in tensors.values())
            sizes = are_sizes([checksum.bytes]) and all(are_sizes(list(part)) for part in parts)
            hashes = (checksum.sha256, *(part.sha256 for part in tensors.values()))
            if not sizes or not all(map(is_sha256, hashes)):
                raise ValueError("sizes and sha256 expected")
            ends = [stop for _, stop in parts]
            if any(start < stop for (start, _), stop in zip(parts[1:], ends, strict=False)):
                raise ValueError("tensors overlap")
        except (AttributeError, KeyError, TypeError) as reason:
            raise ValueError(f"not a file's checksum: {reason!r}") from None
        return checksum


def is_sha256(value: object) -> bool:
    """Say whether a text is 64 hexadecimal digits in lower case."""
    return isinstance(value, str) and _HEXADECIMAL.fullmatch(value) is not None


class Checksummer:
    """Takes a file's bytes in order and makes its checksum. `tensors` has the name, start and bytes of each tensor.

    `position` is that of the first byte, if it is not the file's.
    """

    def __init__(self, tensors: Sequence[tuple[str, int, int]] = (), position: int = 0):
        self._tensors = sorted(tensors, key=lambda tensor: tensor[1])
        self._digests = [hashlib.sha256() for _ in self._tensors]
        self._rest = hashlib.sha256()
        self._position, self._next = position, 0

    def update(self, data: memoryview) -> None:
        """Take the next bytes."""
        while data:
            if self._next == len(self._tensors):
                digest, room = self._rest, math.inf
            else:
                _, start, size = self._tensors[self._next]
                inside = self._position >= start
                digest = self._digests[self._next] if inside else self._rest
                room = start + size - self._position if inside else start - self._position
                if inside and room <= 0:
                    self._next += 1
                    continue
            part = data[: int(min(room, len(data)))]
            digest.update(part)
            self._position += len(part)
            data = data[len(part) :]

    def result(self) -> FileChecksum:
        """Return the checksum of everything so far."""
        tensors = {
            name: TensorChecksum(start, size, digest.hexdigest())
            for (name, start, size), digest in zip(self._tensors, self._digests, strict=True)
        }
        return FileChecksum(self._position, self._rest.hexdigest(), tensors)


def blocks(
    file: Path, cuts: Sequence[int] = (), section: tuple[int, int] | None = None
) -> Iterator[tuple[int, memoryview]]:
    """Yield a file, or a section of it, in blocks with their positions. A block ends at each of `cuts`.

    The next block uses the same memory.
    """
    buffer = memoryview(bytearray(BLOCK))
    position, stop = section or (0, file.stat().st_size)
    for end in [*sorted({cut for cut in cuts if position < cut < stop}), stop]:
        while position < end:
            block = buffer[: min(BLOCK, end - position)]
            read_into(file, position, block)
            yield position, block
            position += len(block)


def checksum_like(file: Path, expected: FileChecksum, advance: Callable[[int], None]) -> FileChecksum | None:
    """Return a file's own checksum in the parts that `expected` has; None if it is unreadable or of another size."""
    if not file.is_file() or file.stat().st_size != expected.bytes:
        return None
    summer = Checksummer([(name, part.start, part.bytes) for name, part in expected.tensors.items()])
    try:
        for _, block in blocks(file):
            summer.update(block)
            advance(len(block))
    except CheckpointError:  # it cannot be read to its end
        return None
    return summer.result()


def found_checksums(
    files: Mapping[str, Path], expected: Mapping[str, FileChecksum], advance: Callable[[int, str], None]
) -> dict[str, FileChecksum | None]:
    """The same for many files by name, on every core."""

    def found(name: str) -> FileChecksum | None:
        return checksum_like(files[name], expected[name], lambda count: advance(count, name))

    return in_threads(found, list(files))
