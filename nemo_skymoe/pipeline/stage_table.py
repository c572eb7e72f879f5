"""Time, memory and the fewest recomputed layers of every range of blocks, on every stage."""

from functools import cached_property

import numpy as np

from nemo_skymoe.pipeline.layout import transfer_time
from nemo_skymoe.pipeline.problem import PipelineProblem


class RangeTable:
    """Prefix sums of a problem's blocks, which give the memory of many ranges [start, stop) at once.

    The layers in [start, middle) are recomputed, the others are not. `start`, `middle` and `stop` are index arrays.
    """

    def __init__(self, problem: PipelineProblem) -> None:
        blocks = problem.blocks
        self.blocks = len(blocks)
        recomputable = np.array([block.kind == "layer" for block in blocks])
        activations = np.array([block.activations for block in blocks])
        checkpoint = np.where(recomputable, [block.checkpoint for block in blocks], activations)
        working = np.array([block.working for block in blocks])
        self.layers = _prefix_sums(recomputable.astype(int))
        self.forward = _prefix_sums([block.forward for block in blocks])
        self.backward = _prefix_sums([block.backward for block in blocks])
        self.recompute = _prefix_sums(np.where(recomputable, [block.recompute for block in blocks], 0.0))
        self.weights = _prefix_sums([block.weights for block in blocks])
        self._kept = _prefix_sums(activations)
        self._checkpoints = _prefix_sums(checkpoint)
        self._peak_recomputed = _range_maxima(self._checkpoints[:-1] + activations + working)
        self._peak_kept = _range_maxima(self._kept[1:] + working)

    def held(self, start: np.ndarray, middle: np.ndarray, stop: np.ndarray) -> np.ndarray:
        """Return `Chunk.held` of every range, in bytes."""
        return self._checkpoints[middle] - self._checkpoints[start] + self._kept[stop] - self._kept[middle]

    def peak(self, start: np.ndarray, middle: np.ndarray, stop: np.ndarray) -> np.ndarray:
        """Return `Chunk.peak` of every range, in bytes."""
        recomputed = self._peak_recomputed[start, middle] - self._checkpoints[start]
        before = self._checkpoints[middle] - self._checkpoints[start] - self._kept[middle]
        return np.maximum(recomputed, self._peak_kept[middle, stop] + before)


class StageTable:
    """The costs of a stage of 1F1B for every range of blocks; arrays are [stages, first block, block after the last].

    The fewest recomputed layers that fit are also the fastest choice: the first n layers of a range are recomputed, so
    time grows with n, and memory falls.
    """

    def __init__(self, problem: PipelineProblem) -> None:
        self.problem = problem
        self.ranges = RangeTable(problem)
        shape = (problem.stages, self.ranges.blocks + 1, self.ranges.blocks + 1)
        self.start, self.stop = np.indices(shape[1:])
        self.middle = np.empty(shape, dtype=int)
        self.shortage = np.empty(shape)
        """Bytes over the limit with every layer recomputed."""
        for stage in range(problem.stages):
            in_flight = min(problem.micro_batches, problem.stages - stage)
            self.middle[stage] = self._fewest_recomputed(in_flight)
            self.shortage[stage] = self._memory(self.stop, in_flight) - problem.memory_limit

    @cached_property
    def time(self) -> np.ndarray:
        """Seconds per micro-batch, as in `Layout.times`, infinite if the range is empty or does not fit."""
        ranges, problem = self.ranges, self.problem
        compute = ranges.forward + ranges.backward
        transfers = np.array([transfer_time(problem, stage) for stage in range(problem.stages)])
        time = compute[self.stop] - compute[self.start] + self.recompute + transfers[:, None, None]
        return np.where((self.shortage <= 0) & (self.start < self.stop), time, np.inf)

    @cached_property
    def recompute(self) -> np.ndarray:
        """Seconds of recomputation per micro-batch."""
        return self.ranges.recompute[self.middle] - self.ranges.recompute[self.start]

    @property
    def recomputed(self) -> np.ndarray:
        """Number of recomputed layers."""
        return self.ranges.layers[self.middle] - self.ranges.layers[self.start]

    def price(self, cuts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the seconds forward and backward, [layouts, stages], of cuts [layouts, stages + 1].

        They are infinite if a stage does not fit.
        """
        stages, start, stop = np.arange(self.problem.stages), cuts[:, :-1], cuts[:, 1:]
        fits = np.isfinite(self.time[stages, start, stop])
        forward = self.ranges.forward[stop] - self.ranges.forward[start]
        backward = self.ranges.backward[stop] - self.ranges.backward[start]
        backward = backward + self.recompute[stages, start, stop]
        return np.where(fits, forward, np.inf), np.where(fits, backward, np.inf)

    def _memory(self, middle: np.ndarray, in_flight: int) -> np.ndarray:
        start, stop = self.start, np.maximum(self.start, self.stop)
        weights = self.ranges.weights[stop] - self.ranges.weights[start]
        held = self.ranges.held(start, middle, stop)
        return weights + (in_flight - 1) * held + self.ranges.peak(start, middle, stop)

    def _fewest_recomputed(self, in_flight: int) -> np.ndarray:
        """Find the smallest `middle` that fits, or `stop`, by bisection: memory falls as `middle` grows."""
        low, high = self.start.copy(), np.maximum(self.start, self.stop)
        while (low < high).any():
            middle = (low + high) // 2
            fits = self._memory(middle, in_flight) <= self.problem.memory_limit
            high = np.where(fits, middle, high)
            low = np.where(fits, low, np.minimum(middle + 1, high))
        return high


def _prefix_sums(values: np.ndarray | list[float]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(values)])


def _range_maxima(values: np.ndarray) -> np.ndarray:
    """Return the maximum of values[first:stop] at [first, stop], minus infinity if that range is empty."""
    size = len(values)
    maxima = np.full((size + 1, size + 1), -np.inf)
    for first in range(size):
        maxima[first, first + 1 :] = np.maximum.accumulate(values[first:])
    return maxima
