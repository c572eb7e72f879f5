"""What the exact planner minimises, and the layout that it finds."""

import numpy as np

from nemo_skymoe.pipeline.exact import exact_cuts
from nemo_skymoe.pipeline.layout import Layout
from nemo_skymoe.pipeline.problem import PipelineProblem
from nemo_skymoe.pipeline.stage_table import StageTable


def estimate(layout: Layout) -> float:
    """Seconds of a step without the tail, by closed form.

    (m - 1) max t + sum t for 1F1B; with v virtual stages m max t + (sum t - max t) / v, which is the same for v = 1
    and, as that one, exact for stages that are all alike.
    """
    slowest = max(layout.times)
    filling = (sum(layout.times) - slowest) / layout.problem.virtual_stages
    return layout.problem.micro_batches * slowest + filling


def exact_layout(problem: PipelineProblem) -> Layout:
    """The layout of `exact_cuts`, in which every stage recomputes the fewest layers that fit."""
    table = StageTable(problem)
    cuts = exact_cuts(table)
    recomputed = table.recomputed[np.arange(len(cuts) - 1), cuts[:-1], cuts[1:]]
    return Layout(problem, cuts, tuple(recomputed.tolist()))
