"""The header of a safetensors file, read without trusting a byte of it.

The library's own `get_slice` does not say where in the file a tensor is, which checksums need; it takes a header that has
a name twice; and it maps the file: copies took twice the time, and the memory of the whole file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nemo_skymoe.checkpoint.tensors.saved_tensor import SavedTensor
from nemo_skymoe.durable.errors import CheckpointError
from nemo_skymoe.durable.reading import are_sizes, read_bytes

DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "C64": "complex64",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}
"""The format's names of data types, and torch's."""
LONGEST_HEADER = 100_000_000
"""Bytes; the format's own limit."""


def read_header(file: Path) -> dict[str, SavedTensor]:
    """Return the tensors of one safetensors file, of which every byte is checked to be accounted for."""
    size = file.stat().st_size
    if size < 8:
        raise CheckpointError(f"'{file}' is truncated: {size} bytes, expected a safetensors header")
    length = int.from_bytes(read_bytes(file, 0, 8), "little")
    if not 2 <= length <= min(LONGEST_HEADER, size - 8):
        raise CheckpointError(
            f"'{file}' claims a header of {length:,} bytes, expected 2 to {min(LONGEST_HEADER, size - 8):,}"
        )
    header = parse_json(read_bytes(file, 8, length), file)
    header.pop("__metadata__", None)
    places: dict[str, SavedTensor] = {}
    position = 8 + length
    entries = [(_entry(file, name, value), name) for name, value in header.items()]
    for (offsets, shape, dtype), name in sorted(entries):
        place = SavedTensor(dtype, shape, 8 + length + offsets[0])
        if place.start != position:
            kind = "overlaps the tensor before it" if place.start < position else "follows a hole"
            raise CheckpointError(f"'{name}' in '{file}' {kind}")
        if place.stop != 8 + length + offsets[1]:
            raise CheckpointError(
                f"'{name}' in '{file}' is {offsets[1] - offsets[0]:,} bytes, expected"
                f" {place.stop - place.start:,} for {dtype} of shape {list(shape)}"
            )
        places[name], position = place, place.stop
    if position != size:
        raise CheckpointError(f"'{file}' is {size:,} bytes, expected {position:,} by its header")
    return places


def parse_json(data: bytes, file: Path) -> dict[str, Any]:
    """Read a JSON object, and refuse repeated names."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise ValueError("a name occurs twice")
        return result

    try:
        result = json.loads(data.decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as reason:
        raise CheckpointError(f"'{file}' has no valid JSON where expected: {reason}") from None
    if not isinstance(result, dict):
        raise CheckpointError(f"'{file}' holds a JSON {type(result).__name__}, expected an object")
    return result


def _entry(file: Path, name: str, value: object) -> tuple[tuple[int, int], tuple[int, ...], str]:
    """Return offsets, shape and torch's data type of a header's entry."""
    entry = value if isinstance(value, dict) else {}
    shape, offsets, dtype = entry.get("shape"), entry.get("data_offsets"), entry.get("dtype")
    if not are_sizes(shape) or not are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"'{name}' in '{file}' has the shape {shape!r} and offsets {offsets!r}")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(
            f"'{name}' in '{file}' is of data type {dtype!r}, expected one of {', '.join(DTYPES)}"
        )
    return (offsets[0], offsets[1]), tuple(shape), DTYPES[dtype]
