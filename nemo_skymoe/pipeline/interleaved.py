"""Heuristics for layouts of interleaved 1F1B: they balance the chunks, and add recomputation until every stage fits."""

from collections.abc import Sequence

import numpy as np

from nemo_skymoe.pipeline.exact import Cuts, cheapest_cuts
from nemo_skymoe.pipeline.problem import PipelineProblem
from nemo_skymoe.pipeline.schedule import in_flight
from nemo_skymoe.pipeline.search import moves
from nemo_skymoe.pipeline.stage_table import RangeTable

_STEEPNESS = (
    -0.8,
    -0.5,
    -0.3,
    -0.15,
    0.0,
    0.15,
    0.3,
    0.5,
    0.8,
)  # starting points have light chunks last (below 0) or first (above 0)
_NO_TIME = 1e-30  # seconds: keeps what recomputation saves per second finite


class InterleavedTable:
    """Recomputed layers, memory and times of interleaved layouts. All methods take cuts [layouts, chunks + 1]."""

    def __init__(self, problem: PipelineProblem) -> None:
        self.problem = problem
        self.ranges = RangeTable(problem)
        kinds = [block.kind for block in problem.blocks]
        self._first_layer = np.array([start + (kind == "embedding") for start, kind in enumerate(kinds)])
        self._layers_end = np.array([0] + [stop + (kind != "head") for stop, kind in enumerate(kinds)])
        saved = np.array([block.activations - block.checkpoint for block in problem.blocks])
        seconds = np.array([block.recompute for block in problem.blocks])
        self._worth = np.append(saved / np.maximum(seconds, _NO_TIME), 0.0)

    def price(self, cuts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the seconds forward and backward, [layouts, chunks], infinite if a stage does not fit."""
        middle = self.middle(cuts)
        forward, backward = self.times(cuts, middle)
        fits = (self.memory(cuts, middle) <= self.problem.memory_limit).all(axis=1, keepdims=True)
        return np.where(fits, forward, np.inf), np.where(fits, backward, np.inf)

    def times(self, cuts: np.ndarray, middle: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the seconds forward, and backward with all layers before `middle` recomputed, [layouts, chunks]."""
        start, stop, ranges = cuts[:, :-1], cuts[:, 1:], self.ranges
        forward = ranges.forward[stop] - ranges.forward[start]
        backward = ranges.backward[stop] - ranges.backward[start]
        backward = backward + ranges.recompute[middle] - ranges.recompute[start]
        return np.broadcast_to(forward, backward.shape), backward

    def first_layers(self, cuts: np.ndarray) -> np.ndarray:
        """Return the first block of every chunk that can be recomputed, [layouts, chunks]."""
        return np.minimum(self._first_layer[cuts[:, :-1]], cuts[:, 1:])

    def recomputed(self, cuts: np.ndarray) -> np.ndarray:
        """Return the number of recomputed layers, [layouts, chunks]."""
        return self.ranges.layers[self.middle(cuts)] - self.ranges.layers[cuts[:, :-1]]

    def shortage(self, cuts: np.ndarray) -> np.ndarray:
        """Return the bytes over the limit with every layer recomputed, [layouts, stages]."""
        return self.memory(cuts, self._layers_end[cuts[:, 1:]]) - self.problem.memory_limit

    def middle(self, cuts: np.ndarray) -> np.ndarray:
        """Return the end of every chunk's recomputed blocks, [layouts, chunks].

        The choice is greedy: it takes first what saves most memory per second of recomputation.
        """
        middle = np.empty_like(cuts[:, :-1])
        for stage in range(self.problem.stages):
            own = slice(stage, None, self.problem.stages)
            start, stop = cuts[:, :-1][:, own], cuts[:, 1:][:, own]
            middle[:, own] = self._add_recomputation(stage, start, stop)
        return middle

    def memory(self, cuts: np.ndarray, middle: np.ndarray) -> np.ndarray:
        """Return the bytes that a stage needs, [layouts, stages], as `Layout.memory` counts them."""
        step = self.problem.stages
        stages = [
            self.stage_memory(s, cuts[:, :-1][:, s::step], middle[:, s::step], cuts[:, 1:][:, s::step])
            for s in range(step)
        ]
        return np.stack(stages, axis=1)

    def _add_recomputation(self, stage: int, start: np.ndarray, stop: np.ndarray) -> np.ndarray:
        first, end = self._first_layer[start], self._layers_end[stop]
        middle = np.minimum(first, stop)
        held, _ = self._moments(stage)
        most = held.max(axis=0) + 1
        while True:
            worth = np.where(middle < end, self._worth[middle] * most, -1.0)
            over = self.stage_memory(stage, start, middle, stop) > self.problem.memory_limit
            rows = np.flatnonzero(over & (worth >= 0).any(axis=1))
            if not len(rows):
                break
            middle[rows, worth[rows].argmax(axis=1)] += 1
        for chunk in range(middle.shape[1]):  # the last additions may have made earlier ones unnecessary
            while True:
                fewer = middle.copy()
                fewer[:, chunk] = np.maximum(middle[:, chunk] - 1, np.minimum(first, stop)[:, chunk])
                fits = self.stage_memory(stage, start, fewer, stop) <= self.problem.memory_limit
                if (fewer == middle)[fits].all():
                    break
                middle[fits] = fewer[fits]
        return middle

    def stage_memory(self, stage: int, start: np.ndarray, middle: np.ndarray, stop: np.ndarray) -> np.ndarray:
        """Return the bytes that one stage needs, [layouts]. The other arguments are [layouts, virtual stages]."""
        weights = (self.ranges.weights[stop] - self.ranges.weights[start]).sum(axis=1)
        held, running = self._moments(stage)
        in_use = self.ranges.held(start, middle, stop) @ held.T
        return weights + (in_use + self.ranges.peak(start, middle, stop)[:, running]).max(axis=1)

    def _moments(self, stage: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the number of micro-batches held, [moments, chunks], and the running chunk, [moments]."""
        problem = self.problem
        moments = in_flight(stage, problem.stages, problem.virtual_stages, problem.micro_batches)
        return np.array([m.held for m in moments], dtype=float), np.array([m.running for m in moments])


def balanced_cuts(problem: PipelineProblem) -> list[Cuts]:
    """Return starting points: chunks that are even in time or in memory, or with light chunks first or last."""
    chunks, size = problem.stages * problem.virtual_stages, len(problem.blocks) + 1
    start, stop = np.indices((size, size))
    activations = [block.activations * problem.stages + block.weights for block in problem.blocks]
    checkpoints = [block.checkpoint * problem.stages + block.weights for block in problem.blocks]
    times = [block.time for block in problem.blocks]
    slopes = [np.linspace(1 - steepness, 1 + steepness, chunks) for steepness in _STEEPNESS]
    found = []
    for values, weights in (
        *((times, slope) for slope in slopes),
        (activations, np.ones(chunks)),
        (checkpoints, np.ones(chunks)),
    ):
        sums = np.concatenate([[0.0], np.cumsum(values)])
        cost = np.where(start < stop, (sums[stop] - sums[start]) ** 2, np.inf)
        found.append(cheapest_cuts(cost * weights[:, None, None]))
    return [cuts for cuts in found if cuts is not None]


def fitting_cuts(table: InterleavedTable, seeds: Sequence[Cuts]) -> tuple[list[Cuts], np.ndarray]:
    """Return the seeds that fit, or else cuts that are reached from them by moving blocks off the fullest stage.

    The second result is the shortage of the best cuts: the bytes over the limit of each stage with every layer
    recomputed. If any of them is positive, none fits.
    """
    cuts, best = np.array(seeds), np.inf
    while True:
        shortage = table.shortage(cuts)
        worst = shortage.max(axis=1)
        if worst.min() <= 0 or worst.min() >= best:
            break
        best = worst.min()
        nearest = tuple(cuts[worst.argmin()].tolist())
        cuts = np.array([nearest, *moves(nearest)])
    fits = cuts[worst <= 0]
    return [tuple(row) for row in fits.tolist()], shortage[worst.argmin()]
