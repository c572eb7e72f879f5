"""Regions of checkpoint files, read without mapping them; whatever is wrong is refused by the file's name."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeGuard

from nemo_skymoe.checkpoint.stand_in import BEGINNING, refuse_stand_in
from nemo_skymoe.checkpoint.tensors import ITEM_SIZES, Storage
from nemo_skymoe.config import ConfigurationError

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
        """The tensors, or pieces of them, that `file` holds, by position."""
        ...


def member(folder: Path, name: object, named_by: Path) -> Path:
    """The regular file `name` of `folder`, as `named_by` calls it; a name that leads elsewhere is refused.

    What is read decides on names, so a name never leaves the folder. Whoever made the folder decides on its links,
    which may lead anywhere: to the blobs of the Hugging Face cache, or to another disk.
    """
    if not isinstance(name, str) or not name or "\0" in name or Path(name).name != name or name == "..":
        raise ConfigurationError(f"'{named_by}' names the file {name!r}, expected a file in the same folder")
    path = folder / name
    try:
        status = path.stat()
    except (OSError, RuntimeError) as reason:
        link = f", a link to '{os.readlink(path)}'," if path.is_symlink() else ""
        what = reason.strerror if isinstance(reason, OSError) else reason
        raise ConfigurationError(
            f"'{path}'{link} named by '{named_by.name}' cannot be opened: {what}; download or copy it anew"
        ) from None
    if not stat.S_ISREG(status.st_mode):
        raise ConfigurationError(f"'{path}' is not a regular file")
    refuse_stand_in(path, read_bytes(path, 0, min(status.st_size, BEGINNING)))
    return path


def read_into(path: Path, start: int, target: memoryview) -> None:
    """Fill `target` with the file's bytes from `start` on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        while len(target):
            count = os.preadv(descriptor, [target], start)
            if count == 0:
                raise ConfigurationError(f"'{path}' is truncated: it ends at byte {start}")
            start, target = start + count, target[count:]
    except OSError as reason:
        raise ConfigurationError(f"'{path}' cannot be read: {reason}") from reason
    finally:
        os.close(descriptor)


def read_bytes(path: Path, start: int, size: int) -> bytes:
    """`size` bytes of a file; the caller has checked that the file is that long."""
    data = bytearray(size)
    read_into(path, start, memoryview(data))
    return bytes(data)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    import torch

    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def are_sizes(values: Any) -> TypeGuard[Sequence[int]]:
    """Whether something read from a file is a list of sizes or offsets that a tensor can have."""
    return (
        isinstance(values, list | tuple)
        and len(values) <= 16
        and all(type(size) is int and 0 <= size < 2**62 for size in values)
    )


def box(shape: Sequence[int], index: Sequence[int], rows: tuple[int, int] | None) -> Box:
    """The part of a tensor that `Storage.read` is asked for: one run of its elements."""
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
    """How many elements of a contiguous tensor lie before the region's first."""
    return sum(start * prod(shape[axis + 1 :]) for axis, (start, _) in enumerate(region))
