"""Choose the chunks of an interleaved stage that are recomputed, where that costs the whole simulated step least."""

import itertools

import numpy as np

from nemo_skymoe.pipeline.exact import Cuts
from nemo_skymoe.pipeline.interleaved import InterleavedTable
from nemo_skymoe.pipeline.simulator import simulated_durations

_MOST_CHOICES = 2000


def place_recomputation(table: InterleavedTable, cuts: Cuts) -> tuple[tuple[int, ...], float]:
    """Return the number of recomputed layers of every chunk, and the simulated seconds with them.

    It starts from the table's greedy choice, and replaces the choice of one stage at a time as long as the step gets
    shorter.
    """
    row = np.array([cuts])
    counts = table.recomputed(row)
    choices = [_choices(table, stage, row) for stage in range(table.problem.stages)]
    duration = np.inf
    while True:
        tried = [counts]
        for stage, options in enumerate(choices):
            changed = np.repeat(counts, len(options), axis=0)
            changed[:, stage :: table.problem.stages] = options
            tried.append(changed)
        candidates = np.concatenate(tried)
        durations = simulated_durations(
            table.problem, *table.times(row, table.first_layers(row) + candidates)
        )
        if durations.min() >= duration:
            return tuple(counts[0].tolist()), float(duration)
        counts, duration = candidates[[durations.argmin()]], durations.min()


def _choices(table: InterleavedTable, stage: int, cuts: np.ndarray) -> np.ndarray:
    """Return choices of recomputed layers, [choices, virtual stages], that fit and would not with one less."""
    own = slice(stage, None, table.problem.stages)
    start, stop = cuts[:, :-1][:, own], cuts[:, 1:][:, own]
    first = table.first_layers(cuts)[:, own]
    most = table.ranges.layers[stop[0]] - table.ranges.layers[start[0]]
    if np.prod(most + 1) > _MOST_CHOICES:
        return table.recomputed(cuts)[:, own]
    counts = np.array(list(itertools.product(*(range(count + 1) for count in most))))
    fits = table.stage_memory(stage, start, first + counts, stop) <= table.problem.memory_limit
    fitting = {tuple(count) for count in counts[fits].tolist()}
    minimal = [count for count in fitting if not any(less in fitting for less in _one_less(count))]
    return np.array(sorted(minimal))


def _one_less(counts: tuple[int, ...]) -> list[tuple[int, ...]]:
    return [(*counts[:i], n - 1, *counts[i + 1 :]) for i, n in enumerate(counts) if n]
