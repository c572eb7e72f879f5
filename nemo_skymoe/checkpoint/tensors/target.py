"""A format to be written is a target: files of chunks, further files, and those that make the whole valid."""

from __future__ import annotations

import builtins
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Protocol

from nemo_skymoe.checkpoint.tensors.mapping import Chunk, listed
from nemo_skymoe.checkpoint.tensors.model import Key, Weights
from nemo_skymoe.checkpoint.tensors.regions import DTYPE_SIZES
from nemo_skymoe.durable.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

    from nemo_skymoe.durable.output_file import OutputFile


@dataclass(frozen=True)
class TargetFile:
    """One file of tensors. `name` is its path in the output folder."""

    name: str
    chunks: tuple[Chunk, ...]


class Target(Protocol):
    """A format's files, from the table of its chunks. Names, sizes and order depend on nothing else."""

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        """The table."""
        ...

    @property
    def dtypes(self) -> Mapping[str, str]:
        """Torch's name of the data type of every stored tensor."""
        ...

    @property
    def extras(self) -> Mapping[str, builtins.bytes]:
        """Further files by path."""
        ...

    @property
    def bytes(self) -> int:
        """The size of the output on the disk, within the last per mille."""
        ...

    def files(self) -> tuple[TargetFile, ...]:
        """Return the files of tensors."""
        ...

    def write(self, file: TargetFile, weights: Weights, output: OutputFile) -> None:
        """Write one of them, chunk by chunk."""
        ...

    def last_files(self, sizes: Mapping[str, int]) -> dict[str, bytes]:
        """Return the files that make a checkpoint of a folder with these files, to be written last, in this order."""
        ...


def stored_dtypes(chunks: Iterable[Chunk], weights: Weights) -> dict[str, str]:
    """Return the data type of every stored tensor, torch's name: that of what it is made of.

    Raises:
        CheckpointError: It is made of tensors of different types.
    """
    dtypes: dict[str, str] = {}
    for chunk in chunks:
        for part in chunk.parts:
            if part.key is None:
                continue
            dtype = weights.info(part.key).dtype
            if dtypes.setdefault(chunk.tensor, dtype) != dtype:
                raise CheckpointError(
                    f"'{chunk.tensor}' would hold {part.key} in {dtype} beside {dtypes[chunk.tensor]}: expected one"
                    " data type for all that is stacked"
                )
    return dtypes


def chunk_bytes(chunk: Chunk, dtype: str) -> int:
    """Size of a chunk's elements."""
    return prod(chunk.chunk_shape) * DTYPE_SIZES[dtype]


def contiguous(tensor: Tensor) -> Tensor:
    """Return a tensor whose memory is its elements and nothing else."""
    if tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes:
        return tensor
    import torch

    return tensor.clone(memory_format=torch.contiguous_format)


def check_complete(chunks: Sequence[Chunk], weights: Weights) -> None:
    """Refuse a table that leaves out, or has twice, a tensor of the model or a piece of the target.

    Raises:
        CheckpointError: With the list.
    """
    rows: dict[Key, list[tuple[int, int]]] = defaultdict(list)
    names: Counter[str] = Counter()
    counts: Counter[tuple[str, int]] = Counter()
    for chunk in chunks:
        names[chunk.name] += 1
        counts[chunk.tensor, prod(chunk.shape[: len(chunk.index)])] += 1
        for part in chunk.parts:
            if part.key is not None:
                rows[part.key].append((part.start, part.stop))
    problems = [f"'{name}' would be written {count} times" for name, count in names.items() if count > 1]
    problems += [
        f"'{tensor}' would be written in {found} of {expected} pieces"
        for (tensor, expected), found in counts.items()
        if found != expected
    ]
    problems += [
        f"'{chunk.name}' would not be filled" for chunk in chunks if _rows(chunk) != chunk.chunk_shape[:1]
    ]
    keys = set(weights.keys())
    problems += [f"{key} is not in the source" for key in sorted(rows.keys() - keys, key=str)]
    problems += [
        f"{key} would not be written exactly once"
        for key in sorted(keys, key=str)
        if not _tiles(rows[key], weights.info(key).shape[0])
    ]
    if problems:
        raise CheckpointError(f"the target does not hold exactly the source's tensors: {listed(problems)}")


def _rows(chunk: Chunk) -> tuple[int, ...]:
    return (sum(part.stop - part.start for part in chunk.parts),)


def _tiles(ranges: list[tuple[int, int]], size: int) -> bool:
    position = 0
    for start, stop in sorted(ranges):
        if start != position:
            return False
        position = stop
    return position == size
