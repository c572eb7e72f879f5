"""The places and sizes of a checkpoint's tensors in its files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from nemo_skymoe.checkpoint.tensors.model import ITEM_SIZES, Storage

if TYPE_CHECKING:
    from torch import Tensor

DTYPE_SIZES = ITEM_SIZES | {
    "float8_e4m3fnuz": 1,
    "float8_e5m2fnuz": 1,
    "float8_e8m0fnu": 1,
    "complex64": 8,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint64": 8,
    "uint32": 4,
    "uint16": 2,
    "uint8": 1,
    "bool": 1,
}
"""Bytes of an element, by torch's name, of everything a checkpoint's files may hold beside the weights too."""
Box = tuple[tuple[int, int], ...]
"""Start and stop in every dimension."""


@dataclass(frozen=True)
class Extent:
    """Bytes `start` to `stop` of a file hold (a piece of) a tensor."""

    name: str
    dtype: str
    start: int
    stop: int


class FileStorage(Storage, Protocol):
    """A storage that knows where in its files the tensors are."""

    def extents(self, file: Path) -> Sequence[Extent]:
        """Return the tensors, or pieces of them, that `file` holds, by position."""
        ...


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous tensor."""
    import torch

    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def box(shape: Sequence[int], index: Sequence[int], rows: tuple[int, int] | None) -> Box:
    """Return the part of a tensor that `Storage.read` is asked for: one run of its elements."""
    picked = [(position, position + 1) for position in index]
    if rows is not None:
        picked.append(rows)
    if len(picked) > len(shape) or any(
        not 0 <= start <= stop <= size for (start, stop), size in zip(picked, shape, strict=False)
    ):
        raise IndexError(f"index {tuple(index)} and rows {rows} of a tensor of shape {tuple(shape)}")
    return (*picked, *((0, size) for size in shape[len(picked) :]))


def box_shape(region: Box, index: Sequence[int]) -> tuple[int, ...]:
    """The shape of what was asked for: without the dimensions that `index` picked from."""
    return tuple(stop - start for start, stop in region[len(index) :])


def first_element(region: Box, shape: Sequence[int]) -> int:
    """Return how many elements of a contiguous tensor lie before the region's first."""
    return sum(start * prod(shape[axis + 1 :]) for axis, (start, _) in enumerate(region))
