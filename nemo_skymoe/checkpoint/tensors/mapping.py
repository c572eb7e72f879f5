"""Chunks say which rows of which tensors by meaning make up each stored tensor. They are read in both directions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nemo_skymoe.architecture import Architecture
from nemo_skymoe.checkpoint.tensors.buffers import empty
from nemo_skymoe.checkpoint.tensors.model import Key, Storage, TensorInfo, Weights, key_shape, model_keys
from nemo_skymoe.durable.errors import CheckpointError

if TYPE_CHECKING:  # a --dry-run has less time than importing torch takes
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Part:
    """Consecutive rows of a chunk: rows `start` to `stop` of the tensor `key`; with no key, zeros (padding)."""

    key: Key | None
    start: int
    stop: int


@dataclass(frozen=True)
class Chunk:
    """The unit of reading and writing: a stored tensor, or the slice of a stacked one at the leading `index`."""

    tensor: str
    shape: tuple[int, ...]
    """The shape of the whole stored tensor."""
    parts: tuple[Part, ...]
    index: tuple[int, ...] = ()

    @property
    def chunk_shape(self) -> tuple[int, ...]:
        """The dimensions of `shape` that `index` leaves."""
        return self.shape[len(self.index) :]

    @property
    def name(self) -> str:
        """The tensor's name, with the place in it."""
        return f"{self.tensor}[{', '.join(map(str, self.index))}]" if self.index else self.tensor


def assemble(chunk: Chunk, weights: Weights, dtype: torch.dtype) -> Tensor:
    """Return a chunk's content, of `chunk_shape`. Reads each tensor that it needs once; holds two copies at most."""
    if len(chunk.parts) == 1 and (key := chunk.parts[0].key) is not None:
        tensor = weights.read(key)
        if tensor.shape == chunk.chunk_shape and chunk.parts[0].start == 0:
            return tensor.to(dtype)
    target = empty(chunk.chunk_shape, str(dtype).removeprefix("torch."))
    places: dict[Key, list[tuple[int, Part]]] = defaultdict(list)
    row = 0
    for part in chunk.parts:
        if part.key is None:
            target[row : row + part.stop - part.start] = 0
        else:
            places[part.key].append((row, part))
        row += part.stop - part.start
    for key, wanted in places.items():
        tensor = weights.read(key)
        for row, part in wanted:
            target[row : row + part.stop - part.start] = tensor[part.start : part.stop]
    return target


class StoredWeights:
    """The tensors by meaning of a folder whose format is `chunks`.

    Raises:
        CheckpointError: The folder lacks a tensor, has one that no chunk explains, or one of another shape.
    """

    def __init__(self, storage: Storage, architecture: Architecture, chunks: Iterable[Chunk]):
        self.storage, self.architecture = storage, architecture
        self._places: dict[Key, list[tuple[Chunk, int, Part]]] = defaultdict(list)
        shapes: dict[str, tuple[int, ...]] = {}
        for chunk in chunks:
            shapes[chunk.tensor] = chunk.shape
            row = 0
            for part in chunk.parts:
                if part.key is not None:
                    self._places[part.key].append((chunk, row, part))
                row += part.stop - part.start
        check_tensors(storage, shapes)

    def keys(self) -> tuple[Key, ...]:
        """Return every tensor of the model, in the order of the layers."""
        return model_keys(self.architecture)

    def info(self, key: Key) -> TensorInfo:
        """Shape and data type, without reading."""
        stored = self.storage.tensors[self._places[key][0][0].tensor]
        return TensorInfo(key_shape(self.architecture, key), stored.dtype)

    def read(self, key: Key) -> Tensor:
        """Return the whole tensor, gathered from wherever the format keeps its rows."""
        places = self._places[key]
        if len(places) == 1:
            return self._rows(*places[0])
        info = self.info(key)
        tensor = empty(info.shape, info.dtype)
        for chunk, row, part in places:
            tensor[part.start : part.stop] = self._rows(chunk, row, part)
        return tensor

    def _rows(self, chunk: Chunk, row: int, part: Part) -> Tensor:
        return self.storage.read(chunk.tensor, chunk.index, (row, row + part.stop - part.start))


def check_tensors(storage: Storage, expected: dict[str, tuple[int, ...]]) -> None:
    """Refuse a folder whose tensors are not exactly those expected, with the list."""
    found = storage.tensors
    problems = [f"'{name}' is missing" for name in sorted(expected.keys() - found.keys())]
    problems += [f"'{name}' has no place in the model" for name in sorted(found.keys() - expected.keys())]
    problems += [
        f"'{name}' is {list(found[name].shape)}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name].shape != shape
    ]
    if problems:
        raise CheckpointError(
            f"'{storage.folder}' is not the model its configuration describes: {listed(problems)}"
        )


def listed(problems: Sequence[str], most: int = 8) -> str:
    """Return the first few of a list, and how many more there are."""
    more = f"; and {len(problems) - most} more" if len(problems) > most else ""
    return "; ".join(problems[:most]) + more
