"""Folders of safetensors files as Hugging Face lays them out, read without trusting a byte of their headers.

The library's own `get_slice` does not say where in the file a tensor is, which checksums need; it takes a header that has
a name twice; and it maps the file: copies took twice the time, and the memory of the whole file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_skymoe.checkpoint import foreign
from nemo_skymoe.checkpoint.tensors.buffers import empty
from nemo_skymoe.checkpoint.tensors.mapping import listed
from nemo_skymoe.checkpoint.tensors.model import TensorInfo
from nemo_skymoe.checkpoint.tensors.regions import (
    DTYPE_SIZES,
    Extent,
    box,
    box_shape,
    first_element,
    tensor_bytes,
)
from nemo_skymoe.durable.errors import CheckpointError
from nemo_skymoe.durable.reading import are_sizes, member, read_bytes, read_into

if TYPE_CHECKING:
    from torch import Tensor

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
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
_NUMBERED = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


@dataclass(frozen=True)
class _Place:
    file: Path
    start: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def stop(self) -> int:
        return self.start + prod(self.shape) * DTYPE_SIZES[self.dtype]


class SafetensorsStorage:
    """`model.safetensors`, or the shards that `model.safetensors.index.json` names. Reads headers only.

    Raises:
        CheckpointError: A file is missing, truncated, not what its header or the index says, or a pickle.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        index = self.folder / INDEX
        shards = _shards(self.folder)
        self.files = (*shards, index) if index.is_file() else tuple(shards)
        self._places: dict[str, _Place] = {}
        for shard, indexed in shards.items():
            places = read_header(shard)
            _check_index(shard, indexed, places.keys())
            twice = self._places.keys() & places.keys()
            if twice:
                raise CheckpointError(f"'{shard}' holds '{min(twice)}', as another shard does")
            self._places |= places
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(place.shape, place.dtype) for name, place in self._places.items()
        }

    def extents(self, file: Path) -> list[Extent]:
        """Return the tensors of one file by position."""
        held = [
            Extent(name, place.dtype, place.start, place.stop)
            for name, place in self._places.items()
            if place.file == file
        ]
        return sorted(held, key=lambda extent: extent.start)

    def read(self, name: str, index: tuple[int, ...] = (), rows: tuple[int, int] | None = None) -> Tensor:
        """Read as `Storage.read` says."""
        place = self._places[name]
        region = box(place.shape, index, rows)
        tensor = empty(box_shape(region, index), place.dtype)
        start = place.start + first_element(region, place.shape) * DTYPE_SIZES[place.dtype]
        read_into(place.file, start, tensor_bytes(tensor))
        return tensor


def read_header(file: Path) -> dict[str, _Place]:
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
    places: dict[str, _Place] = {}
    position = 8 + length
    entries = [(_entry(file, name, value), name) for name, value in header.items()]
    for (offsets, shape, dtype), name in sorted(entries):
        place = _Place(file, 8 + length + offsets[0], shape, dtype)
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


def _shards(folder: Path) -> dict[Path, set[str] | None]:
    """Return the files of a model by name, each with the tensors that the index says it holds, if there is one."""
    if not folder.is_dir():
        raise CheckpointError(f"'{folder}' is not a folder")
    names = sorted(path.name for path in folder.iterdir())
    index = folder / INDEX
    if INDEX not in names:
        if SINGLE in names:
            return {member(folder, SINGLE, folder): None}
        raise CheckpointError(_what_is_missing(folder, names))
    if SINGLE in names:
        raise CheckpointError(f"'{folder}' has both '{SINGLE}' and '{INDEX}': delete the one that is stale")
    index = member(folder, INDEX, folder)
    if (size := index.stat().st_size) > LONGEST_HEADER:
        raise CheckpointError(f"'{index}' is {size:,} bytes, expected at most {LONGEST_HEADER:,}")
    weight_map = parse_json(read_bytes(index, 0, size), index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"'{index}' has no weight_map")
    shards: dict[Path, set[str] | None] = {}
    for shard in sorted(set(map(str, weight_map.values()))):
        shards[member(folder, shard, index)] = {name for name, file in weight_map.items() if file == shard}
    strays = {name for name in names if _NUMBERED.fullmatch(name)} - {shard.name for shard in shards}
    if strays:
        raise CheckpointError(
            f"'{folder / min(strays)}' is not in '{INDEX}': delete it if it is left from another save"
        )
    return shards


def _what_is_missing(folder: Path, names: list[str]) -> str:
    foreign.refuse_folder(folder, is_model=False)
    shards = [name for name in names if name.endswith(".safetensors")]
    found = f"'{shards[0]}' but no '{INDEX}'" if shards else f"neither '{SINGLE}' nor '{INDEX}'"
    return f"'{folder}' has {found}: expected a complete Hugging Face model"


def _check_index(shard: Path, indexed: set[str] | None, held: Any) -> None:
    if indexed is None:
        return
    problems = [f"'{name}' is in the index only" for name in sorted(indexed - held)]
    problems += [f"'{name}' is not in the index" for name in sorted(held - indexed)]
    if problems:
        raise CheckpointError(f"'{shard}' and '{INDEX}' differ: {listed(problems)}")
