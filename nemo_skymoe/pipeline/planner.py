"""Find the best pipeline layout for a problem: a closed form proposes layouts, and the simulator ranks them."""

import numpy as np

from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.pipeline.exact import Cuts, cheapest_cuts, exact_cuts, shortage_message
from nemo_skymoe.pipeline.interleaved import InterleavedTable, balanced_cuts, fitting_cuts
from nemo_skymoe.pipeline.layout import Layout
from nemo_skymoe.pipeline.problem import PipelineProblem
from nemo_skymoe.pipeline.recomputation import place_recomputation
from nemo_skymoe.pipeline.search import SimulatedSearch
from nemo_skymoe.pipeline.simulator import simulated_durations
from nemo_skymoe.pipeline.stage_table import StageTable

_BOUNDS = 12
_PLACED = 16
_LAST_STAGES = 7


def best_layout(problem: PipelineProblem) -> Layout:
    """Return the layout with the shortest simulated step that is found. It recomputes layers only if memory is short.

    1F1B starts from the cuts of `exact_cuts`. Interleaved 1F1B is `heuristic_interleaved_layout`.

    Args:
        problem: The blocks, the stages and the memory limit.

    Raises:
        ConfigurationError: No layout fits. The message says what is missing, and by how much.
    """
    if problem.virtual_stages > 1:
        return heuristic_interleaved_layout(problem)
    table = StageTable(problem)
    best = exact_cuts(table)
    duration = float(simulated_durations(problem, *table.price(np.array([best])))[0])
    seeds = {best, *_candidates(table, best, duration)}
    return _layout(table, SimulatedSearch(problem, table.price).run(seeds))


def heuristic_interleaved_layout(problem: PipelineProblem) -> Layout:
    """Return the interleaved layout with the shortest simulated step that a local search finds.

    Raises:
        ConfigurationError: It finds none that fits. The message says what is missing, and by how much.
    """
    table = InterleavedTable(problem)
    seeds, shortage = fitting_cuts(table, balanced_cuts(problem))
    if not seeds:
        raise ConfigurationError(shortage_message(problem, int(shortage.argmax()), float(shortage.max())))
    search = SimulatedSearch(problem, table.price)
    search.run(seeds)
    placed = [(*place_recomputation(table, cuts), cuts) for cuts in search.ranked()[:_PLACED]]
    recomputed, _, cuts = min(placed, key=lambda one: one[1])
    return Layout(problem, cuts, recomputed)


def _candidates(table: StageTable, best: Cuts, duration: float) -> list[Cuts]:
    """Return layouts that may be faster than `best` although their estimate is not.

    The estimate ignores the order of the stages. Let T be the greatest time of a stage, and consider the last stage
    with it. While that stage does its warm-up forwards and cool-down backwards, a later stage of time t can work. It
    therefore delays the step by about max(0, t - forward of T) + max(0, t - backward of T), and not by t. For every
    place of that last stage this is a sum again. Layouts whose T exceeds duration / m cannot win.
    """
    problem, forward, backward = table.problem, table.ranges.forward[-1], table.ranges.backward[-1]
    stages, places = problem.stages, np.arange(problem.stages)[:, None, None]
    slowest = table.time[np.arange(stages), best[:-1], best[1:]].max()
    found = set()
    for bound in np.linspace(slowest, max(slowest, duration / problem.micro_batches), _BOUNDS):
        time = np.where(table.time <= bound, table.time, np.inf)
        share = bound * forward / (forward + backward)
        late = np.maximum(0, time - share) + np.maximum(0, time - (bound - share))
        for last in np.unique(np.linspace(0, stages - 1, _LAST_STAGES).astype(int)):
            found.add(cheapest_cuts(np.where(places <= last, time, late)))
    return [cuts for cuts in found if cuts is not None]


def _layout(table: StageTable, cuts: Cuts) -> Layout:
    recomputed = table.recomputed[np.arange(len(cuts) - 1), cuts[:-1], cuts[1:]]
    return Layout(table.problem, cuts, tuple(recomputed.tolist()))
