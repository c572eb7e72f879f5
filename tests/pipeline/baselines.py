"""What people use without a planner, to compare with; both ignore memory and recompute nothing unless told."""

from itertools import pairwise

import numpy as np

from nemo_skymoe.pipeline.exact import Cuts, cheapest_cuts
from nemo_skymoe.pipeline.layout import Layout
from nemo_skymoe.pipeline.problem import PipelineProblem
from nemo_skymoe.pipeline.stage_table import RangeTable


def even_layout(problem: PipelineProblem, recompute_all: bool = False) -> Layout:
    """Megatron's default: as many layers in every chunk, embedding and head with the first and last.

    Megatron refuses layers that do not divide evenly; here the first chunks then have one more.
    """
    layers = [index for index, block in enumerate(problem.blocks) if block.kind == "layer"]
    chunks = problem.stages * problem.virtual_stages
    counts = [len(part) for part in np.array_split(layers, chunks)]
    inner = layers[0] + np.cumsum(counts)[:-1]
    return _layout(problem, (0, *inner.tolist(), len(problem.blocks)), recompute_all)


def balanced_layout(problem: PipelineProblem, recompute_all: bool = False) -> Layout:
    """The contiguous split whose slowest chunk is fastest, as DeepSpeed's `partition_balanced`; greedy within that.

    Chunks are filled from the first one on, each as far as the slowest chunk's time allows.
    """
    ranges, chunks = RangeTable(problem), problem.stages * problem.virtual_stages
    start, stop = np.indices((ranges.blocks + 1, ranges.blocks + 1))
    time = ranges.forward + ranges.backward
    cost = np.where(start < stop, time[stop] - time[start], np.inf)
    cuts = cheapest_cuts(np.broadcast_to(cost, (chunks, *cost.shape)), np.maximum)
    assert cuts is not None, "a problem has at least a layer for every chunk"
    slowest = max(cost[pair] for pair in pairwise(cuts))
    return _layout(problem, _filled(cost, slowest, chunks), recompute_all)


def _filled(cost: np.ndarray, slowest: float, chunks: int) -> Cuts:
    cuts, blocks = [0], len(cost) - 1
    for left in range(chunks - 1, 0, -1):
        fits = np.flatnonzero(cost[cuts[-1], : blocks - left + 1] <= slowest)
        cuts.append(int(fits[-1]))
    return (*cuts, blocks)


def _layout(problem: PipelineProblem, cuts: Cuts, recompute_all: bool) -> Layout:
    layers = RangeTable(problem).layers[list(cuts)]
    counts = np.diff(layers) if recompute_all else np.zeros(len(cuts) - 1, dtype=int)
    return Layout(problem, cuts, tuple(counts.tolist()))
