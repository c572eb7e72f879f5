"""Check that the counts and places in Megatron's index of a data set, `*.idx`, are those of the files on disk."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np

from nemo_skymoe.config import ConfigurationError

_MAGIC, _VERSION, _FIXED = b"MMIDIDX\x00\x00", 1, 34
_TOKEN_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 8, 7: 4, 8: 2}
"""Bytes of a token id by the code of its data type: uint8, int8, int16, int32, int64, float64, float32, uint16."""
_SEQUENCE_BYTES, _DOCUMENT_BYTES = 12, 8
"""Bytes of the length and place of a sequence, and of the number of a document's first sequence."""
_BLOCK = 1 << 22
"""Number of sequences that are checked at once."""


def check_dataset_index(file: Path) -> None:
    """Refuse an index that does not fit its own size or the data beside it, `*.bin`.

    Raises:
        ConfigurationError: The index is damaged. The message names the file and what is wrong with it.
    """
    try:
        problem = _problem(file, file.with_suffix(".bin"))
    except OSError as reason:
        raise ConfigurationError(f"'{reason.filename or file}' cannot be read: {reason.strerror}") from None
    if problem:
        raise ConfigurationError(
            f"'{file}' is no index of Megatron's for the data beside it: {problem}; write the data set again"
        )


def _problem(file: Path, data: Path) -> str | None:
    size = file.stat().st_size
    with file.open("rb") as stream:
        head = stream.read(_FIXED)
    if len(head) < _FIXED or not head.startswith(_MAGIC):
        return f"its {size:,} bytes do not begin as one does"
    version, code, sequences, documents = struct.unpack("<QBQQ", head[len(_MAGIC) :])
    if version != _VERSION or code not in _TOKEN_BYTES:
        return (
            f"version {version} with the data type {code}, expected {_VERSION} with 1 to {max(_TOKEN_BYTES)}"
        )
    expected = _FIXED + sequences * _SEQUENCE_BYTES + documents * _DOCUMENT_BYTES
    # Data of several modalities have a byte more a sequence.
    if size not in (expected, expected + sequences):
        return f"{size:,} bytes, expected {expected:,} for {sequences:,} sequences in {documents - 1:,} documents"
    if not documents:
        return "it has no documents, not even the end of the last one"
    return _wrong_places(file, sequences, documents, _TOKEN_BYTES[code], data.stat().st_size)


def _wrong_places(file: Path, sequences: int, documents: int, width: int, data_bytes: int) -> str | None:
    def numbers(kind: Any, count: int, offset: int) -> Any:
        return np.memmap(file, kind, "r", offset, (count,)) if count else np.zeros(0, kind)

    lengths = numbers("<i4", sequences, _FIXED)
    places = numbers("<i8", sequences, _FIXED + 4 * sequences)
    firsts = numbers("<i8", documents, _FIXED + _SEQUENCE_BYTES * sequences)
    for start in range(0, sequences, _BLOCK):
        length, place = lengths[start : start + _BLOCK].astype(np.int64), places[start : start + _BLOCK]
        wrong = (length < 0) | (place < 0) | (place > data_bytes - length * width)
        if wrong.any():
            first = int(wrong.argmax())
            return (
                f"sequence {start + first:,} is {length[first]:,} tokens from byte {place[first]:,} on, its data end at"
                f" byte {data_bytes:,}"
            )
    for start in range(0, documents, _BLOCK):
        block = firsts[max(0, start - 1) : start + _BLOCK]
        if (np.diff(block) < 0).any() or block.min() < 0 or block.max() > sequences:
            return f"its documents do not follow each other within {sequences:,} sequences"
    if firsts[-1] != sequences:
        return f"its documents end at sequence {firsts[-1]:,}, expected {sequences:,}"
    return None
