"""Find the 1F1B layout with the least (m - 1) max t + sum t that fits in memory, exactly, by dynamic programming."""

import heapq

import numpy as np

from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.pipeline.problem import PipelineProblem
from nemo_skymoe.pipeline.stage_table import StageTable

Cuts = tuple[int, ...]
"""First block of every chunk, and then the number of blocks."""

# Relative. The same times summed in another order differ by roundings, which must not count as another bound or as a
# better layout.
_ROUNDING = 1e-12


def exact_cuts(table: StageTable) -> Cuts:
    """Return the optimal cuts, with which every stage recomputes the fewest layers that fit.

    For a bound T on the slowest stage, `cheapest_cuts` finds the least sum, which falls as T grows. T only has to be
    tried at the times that stages can have. An interval of these is left out if even its smallest T, together with its
    smallest sum, does not beat the best layout found so far.

    Raises:
        ConfigurationError: There are virtual stages, or no layout fits. The message says what is missing.
    """
    if table.problem.virtual_stages > 1:
        raise ConfigurationError(
            f"virtual_stages is {table.problem.virtual_stages}, expected 1 for an exact plan"
        )
    best = cheapest_cuts(table.time)
    if best is None:
        raise ConfigurationError(_what_is_missing(table))
    bounds = _distinct(table.time[np.isfinite(table.time)])
    steady = table.problem.micro_batches - 1
    least, sum_ = _objective(table, best)
    queue = [(steady * bounds[0] + sum_, -1, len(bounds) - 1, sum_)]
    while queue and queue[0][0] < least * (1 - _ROUNDING):
        _, low, high, sum_high = heapq.heappop(queue)
        middle = (low + high) // 2
        if middle == low:
            continue
        found = cheapest_cuts(np.where(table.time <= bounds[middle], table.time, np.inf))
        heapq.heappush(queue, (steady * bounds[middle + 1] + sum_high, middle, high, sum_high))
        if found is not None:
            objective, sum_ = _objective(table, found)
            heapq.heappush(queue, (steady * bounds[low + 1] + sum_, low, middle, sum_))
            if objective < least:
                least, best = objective, found
    return best


def cheapest_cuts(cost: np.ndarray, combine: np.ufunc = np.add) -> Cuts | None:
    """Return the cuts with the least combined cost, or None if all costs are infinite.

    Args:
        cost: [stages, first block, block after the last], infinite if a stage cannot hold that range.
        combine: `np.add` for the sum of the stages' costs, `np.maximum` for the largest of them.
    """
    stages, size, _ = cost.shape
    value = np.full(size, np.inf)
    value[0] = combine.identity if combine.identity is not None else -np.inf
    choices = []
    for stage in range(stages):
        totals = combine(value[:, None], cost[stage])
        choices.append(totals.argmin(axis=0))
        value = totals.min(axis=0)
    if not np.isfinite(value[-1]):
        return None
    cuts = [size - 1]
    for choice in reversed(choices):
        cuts.append(int(choice[cuts[-1]]))
    return tuple(reversed(cuts))


def _objective(table: StageTable, cuts: Cuts) -> tuple[float, float]:
    """Return (m - 1) max t + sum t, and sum t."""
    times = table.time[np.arange(len(cuts) - 1), cuts[:-1], cuts[1:]]
    return (table.problem.micro_batches - 1) * times.max() + times.sum(), times.sum()


def _distinct(values: np.ndarray) -> np.ndarray:
    """Return sorted values, keeping of values that only rounding tells apart the largest, which admits them all."""
    values = np.sort(values)
    return values[np.append(values[1:] > values[:-1] * (1 + _ROUNDING), True)]


def _what_is_missing(table: StageTable) -> str:
    """Describe the stage that lacks most memory, in the layout that lacks least, with every layer recomputed."""
    shortage = np.where(table.start < table.stop, table.shortage, np.inf)
    cuts = cheapest_cuts(shortage, np.maximum)
    assert cuts is not None
    stage = int(np.argmax(shortage[np.arange(len(cuts) - 1), cuts[:-1], cuts[1:]]))
    missing = shortage[stage, cuts[stage], cuts[stage + 1]]
    return shortage_message(table.problem, stage, float(missing))


def shortage_message(problem: PipelineProblem, stage: int, missing: float) -> str:
    """Return the message for a best layout that lacks `missing` bytes on a stage."""
    # Interleaved layouts are found by heuristics, which can miss one that fits.
    tried, best = ("layout", "even the best") if problem.virtual_stages == 1 else ("layout tried", "the best")
    return (
        f"no {tried} fits in {problem.memory_limit / 1e9:.2f} GB: {best} needs {missing / 1e9:.2f} GB more on"
        f" stage {stage} of {problem.stages} with every layer recomputed"
    )
