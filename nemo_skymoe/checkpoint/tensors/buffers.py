"""Memory for tensors that are read and soon dropped: large pieces are used again.

The system hands out memory page by page and clears it, which takes as long as reading a tensor from the cache does.
"""

from __future__ import annotations

import mmap
import sys
import threading
from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING

from nemo_skymoe.checkpoint.tensors.regions import DTYPE_SIZES
from nemo_skymoe.durable.output_file import new_memory

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_SMALL, _LARGE = 1 << 20, 256 << 20
"""Bytes; what is smaller costs nothing, what is larger is not kept."""
_MOST_KEPT = 512 << 20
_FREE = 2
"""References to a piece that no tensor uses: the list's, and that of asking."""
_pieces: list[mmap.mmap] = []
_turn = threading.Lock()


def empty(shape: Sequence[int], dtype: str) -> Tensor:
    """Return an uninitialised tensor. `dtype` is torch's name."""
    import torch

    kind: torch.dtype = getattr(torch, dtype)
    size = prod(shape) * DTYPE_SIZES[dtype]
    if size < _SMALL:
        return torch.empty(tuple(shape), dtype=kind)
    return torch.frombuffer(_memory(size), dtype=torch.uint8).view(kind).view(tuple(shape))


def _memory(size: int) -> mmap.mmap:
    """Return a piece of exactly this size that no tensor uses; tensors hold a reference to theirs."""
    with _turn:
        for place in range(len(_pieces)):
            if len(_pieces[place]) == size and sys.getrefcount(_pieces[place]) == _FREE:
                _pieces.append(_pieces.pop(place))
                return _pieces[-1]
        kept = size if size <= _LARGE else _MOST_KEPT
        for piece in list(_pieces):  # the longest unused first
            if kept + sum(map(len, _pieces)) <= _MOST_KEPT:
                break
            _pieces.remove(piece)
        piece = new_memory(size)
        if size <= _LARGE:
            _pieces.append(piece)
        return piece
