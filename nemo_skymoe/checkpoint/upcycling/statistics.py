"""Mean and standard deviation of a matrix, in double precision and bounded memory."""

from __future__ import annotations

from collections.abc import Iterator
from math import isfinite, sqrt
from typing import TYPE_CHECKING

import numpy as np

from nemo_skymoe.checkpoint.tensors.model import Key
from nemo_skymoe.durable.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

_BLOCK = 1 << 20


class Statistics:
    """Remembers what it has computed: every expert of a layer asks for the same dense matrix."""

    def __init__(self) -> None:
        self._known: dict[Key, tuple[float, float]] = {}

    def of(self, key: Key, matrix: Tensor) -> tuple[float, float]:
        """Mean and population standard deviation of the tensor `key`, rounded to float32.

        The rounding hides the order of the sums, which NumPy chooses by the machine.

        Raises:
            CheckpointError: Not finite.
        """
        if key not in self._known:
            mean, std = mean_and_std(matrix)
            if not (isfinite(mean) and isfinite(std)):
                raise CheckpointError(f"{key} has NaN or infinite weights: its noise has no scale")
            self._known[key] = float(np.float32(mean)), float(np.float32(std))
        return self._known[key]


def mean_and_std(matrix: Tensor) -> tuple[float, float]:
    """Mean and population standard deviation, float64 throughout."""
    count = matrix.numel()
    mean = sum(float(block.sum()) for block in _blocks(matrix)) / count
    if not isfinite(mean):
        return mean, mean
    squares = sum(float(np.square(block - mean).sum()) for block in _blocks(matrix))
    return mean, sqrt(squares / count)


def _blocks(matrix: Tensor) -> Iterator[np.ndarray]:
    for block in matrix.reshape(-1).split(_BLOCK):
        yield block.double().numpy()
