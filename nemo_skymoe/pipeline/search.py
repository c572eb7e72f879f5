"""A local search by the simulator, from good layouts to the one with the shortest simulated step."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np

from nemo_skymoe.pipeline.exact import Cuts
from nemo_skymoe.pipeline.problem import PipelineProblem
from nemo_skymoe.pipeline.simulator import lower_bounds, simulated_durations

Pricing = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
"""A function from cuts [layouts, chunks + 1] to the seconds of forward, and of backward with recomputation, both
[layouts, chunks]. They are infinite if a layout does not fit in memory."""

_BEAM = 8  # layouts whose neighbours a round tries
_PATIENCE = 2  # rounds without a better layout before the search stops
_ROUNDS = 40
_PRICED = 20_000  # layouts a round, before those that cannot win are left out
_SIMULATED_OPERATIONS = 20_000_000


@dataclass
class SimulatedSearch:
    """Moves single blocks between chunks of the best layouts so far, until that stops helping."""

    problem: PipelineProblem
    price: Pricing
    durations: dict[Cuts, float] = field(default_factory=dict)
    """Simulated seconds of every layout tried."""
    _expanded: set[Cuts] = field(default_factory=set)

    def run(self, seeds: Iterable[Cuts]) -> Cuts:
        """Return the best layout found. At least one of `seeds` has to fit."""
        self._simulate(set(seeds))
        best, waiting = min(self.durations.values()), 0
        for _ in range(_ROUNDS):
            beam = [cuts for cuts in self.ranked()[: 2 * _BEAM] if cuts not in self._expanded][: self._beam]
            if waiting == _PATIENCE or not beam:
                break
            self._expanded.update(beam)
            self._simulate({moved for cuts in beam for moved in moves(cuts)} - self.durations.keys())
            found = min(self.durations.values())
            best, waiting = (found, 0) if found < best else (best, waiting + 1)
        return self.ranked()[0]

    def ranked(self) -> list[Cuts]:
        """Return all layouts tried, with the best first."""
        return sorted(self.durations, key=self.durations.__getitem__)

    def _simulate(self, layouts: set[Cuts]) -> None:
        """Simulate the layouts that fit and may be the best. Of too many, take those with the lowest bounds."""
        if not layouts:
            return
        cuts = np.array(sorted(layouts))
        forward, backward = self.price(cuts)
        bounds = lower_bounds(self.problem, forward, backward)
        best = min(self.durations.values(), default=np.inf)
        order = np.argsort(bounds, kind="stable")[: self._batch]
        order = order[bounds[order] < best]
        durations = simulated_durations(self.problem, forward[order], backward[order])
        for index, duration in zip(order, durations, strict=True):
            self.durations[tuple(cuts[index].tolist())] = float(duration)

    @property
    def _beam(self) -> int:
        chunks = self.problem.stages * self.problem.virtual_stages
        return int(np.clip(_PRICED // chunks**2, 1, _BEAM))

    @property
    def _batch(self) -> int:
        problem = self.problem
        operations = 4 * problem.stages * problem.virtual_stages * problem.micro_batches
        return int(np.clip(_SIMULATED_OPERATIONS // operations, 32, 512))


def moves(cuts: Cuts) -> Iterable[Cuts]:
    """Yield every layout with one block moved from one chunk to another; the chunks between them shift along."""
    for first in range(1, len(cuts) - 1):
        for step in (-1, 1):
            for last in range(first, len(cuts) - 1):
                moved = (*cuts[:first], *(cut + step for cut in cuts[first : last + 1]), *cuts[last + 1 :])
                if moved[first - 1] < moved[first] and moved[last] < moved[last + 1]:
                    yield moved
