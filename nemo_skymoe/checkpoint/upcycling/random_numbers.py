"""Normal numbers from a counter: a tensor's depend on the seed and on its place in the model, and on nothing else.

Block b of a stream, elements b * BLOCK to (b + 1) * BLOCK of the tensor in row-major order, is what NumPy's
`Generator(Philox(key, counter)).standard_normal(dtype=float32)` gives with

    key     = [seed, kind << 48 | layer << 24 | expert]     kind: its position in KINDS
    counter = [0, 0, 0, b]

Whatever the order, the number of threads or processes, and wherever a run was resumed, the bytes are the same.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from nemo_skymoe.checkpoint.tensors.buffers import empty
from nemo_skymoe.durable.pool import available_processors

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 1 << 20
"""Elements that come from one counter: 4 MB of float32, what a core's cache holds."""
KINDS = ("router", "gate", "up", "down", "dropped")
"""A number for everything that is drawn; "dropped" are the intermediate indices of Drop-Upcycling."""


@dataclass(frozen=True)
class Stream:
    """The random numbers of one tensor."""

    seed: int
    kind: str
    layer: int
    expert: int = 0

    def generator(self, block: int = 0) -> np.random.Generator:
        """NumPy's generator at the beginning of a block."""
        place = KINDS.index(self.kind) << 48 | self.layer << 24 | self.expert
        key = np.array([self.seed, place], dtype=np.uint64)
        counter = np.array([0, 0, 0, block], dtype=np.uint64)
        return np.random.Generator(np.random.Philox(key=key, counter=counter))


def normal(stream: Stream, shape: tuple[int, ...], mean: float, std: float, dtype: str) -> Tensor:
    """N(mean, std) in float32 arithmetic, rounded to `dtype`, torch's name."""
    drawn = empty(shape, dtype)
    flat = drawn.view(-1)

    def draw(place: slice, numbers: Tensor) -> None:
        flat[place] = numbers.mul_(std).add_(mean)

    _for_each_block(stream, flat.numel(), draw)
    return drawn


def add_normal(stream: Stream, tensor: Tensor, std: float) -> None:
    """Add N(0, std) to a contiguous tensor in place, in float32 arithmetic."""
    flat = tensor.view(-1)

    def add(place: slice, numbers: Tensor) -> None:
        flat[place] = numbers.mul_(std).add_(flat[place].float())

    _for_each_block(stream, flat.numel(), add)


def _for_each_block(stream: Stream, count: int, use: Callable[[slice, Tensor], None]) -> None:
    """Draw `count` standard normal numbers block by block, on every core: NumPy draws without Python's lock."""
    import torch

    buffers = threading.local()

    def one(block: int) -> None:
        if not hasattr(buffers, "numbers"):
            buffers.numbers = np.empty(min(BLOCK, count), dtype=np.float32)
        place = slice(block * BLOCK, min((block + 1) * BLOCK, count))
        numbers = buffers.numbers[: place.stop - place.start]
        stream.generator(block).standard_normal(dtype=np.float32, out=numbers)
        use(place, torch.from_numpy(numbers))

    blocks = range(-(-count // BLOCK))
    threads = min(len(blocks), available_processors())
    if threads < 2:
        for block in blocks:
            one(block)
        return
    with ThreadPoolExecutor(threads) as pool:  # not kept: threads do not survive a fork
        list(pool.map(one, blocks))
