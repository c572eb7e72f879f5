"""The planner against brute force: the closed form exactly, the simulated step within 2 %; and how much it tries."""

import itertools
import random
import re
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.pipeline import exact, planner
from nemo_skymoe.pipeline.layout import Layout
from nemo_skymoe.pipeline.planner import best_layout, heuristic_interleaved_layout
from nemo_skymoe.pipeline.problem import Block, PipelineProblem
from nemo_skymoe.pipeline.simulator import simulate, simulated_durations
from nemo_skymoe.pipeline.task_graph import TaskGraph
from tests.cases import every
from tests.pipeline.baselines import balanced_layout, even_layout
from tests.pipeline.objective import estimate, exact_layout
from tests.pipeline.random_problems import Enumerated, all_cuts, all_layouts, limited, random_problem

GB = 1e9


def drawn(rng: random.Random, most_layers: int = 6, most_stages: int = 4) -> PipelineProblem:
    stages = rng.randint(1, most_stages)
    layers = rng.randint(stages, most_layers)
    return random_problem(rng, layers, stages, rng.randint(1, 16 * stages))


def best(layouts: list[Enumerated], memory_limit: float) -> Enumerated:
    return min((one for one in layouts if one.memory <= memory_limit), key=lambda one: one.estimate)


def least_memory(layouts: list[Enumerated], recomputation: bool) -> float:
    return min(one.memory for one in layouts if recomputation or not any(one.recomputed))


def check(problem: PipelineProblem, layouts: list[Enumerated]) -> Layout:
    """The exact planner finds the optimum, and no stage could do with one recomputed layer less."""
    found, expected = exact_layout(problem), best(layouts, problem.memory_limit)
    assert estimate(found) == pytest.approx(expected.estimate, rel=1e-9)
    assert max(found.memory) <= problem.memory_limit
    (same,) = (one for one in layouts if (one.cuts, one.recomputed) == (found.cuts, found.recomputed))
    assert estimate(found) == pytest.approx(same.estimate, rel=1e-9)
    assert max(found.memory) == pytest.approx(same.memory, rel=1e-9)
    for stage, count in enumerate(found.recomputed):
        fewer = (*found.recomputed[:stage], count - 1, *found.recomputed[stage + 1 :])
        assert count == 0 or Layout(problem, found.cuts, fewer).memory[stage] > problem.memory_limit
    return found


@every(seed=range(340))
def test_is_the_best_layout_where_memory_is_plenty(seed: int):
    problem = drawn(random.Random(seed))
    assert sum(check(problem, all_layouts(problem)).recomputed) == 0


@every(seed=range(340))
def test_is_the_best_layout_where_memory_binds(seed: int):
    """The fastest layout does not fit, another without recomputation does."""
    rng, low, high = random.Random(seed), 1.0, 0.0
    problem, layouts = drawn(rng), []
    while low >= high:
        problem = drawn(rng)
        layouts = all_layouts(problem)
        low, high = least_memory(layouts, recomputation=False), best(layouts, np.inf).memory
    check(limited(problem, low + (high - low) * rng.uniform(0.001, 0.999)), layouts)


@every(seed=range(340))
def test_is_the_best_layout_where_recomputation_is_needed(seed: int):
    """Nothing fits without."""
    rng, low, high = random.Random(seed), 1.0, 0.0
    problem, layouts = drawn(rng), []
    while low >= high:
        problem = drawn(rng)
        layouts = all_layouts(problem)
        low, high = least_memory(layouts, True), least_memory(layouts, False)
    problem = limited(problem, low + (high - low) * rng.uniform(0.001, 0.999))
    assert sum(check(problem, layouts).recomputed) > 0


@every(seed=range(60))
def test_says_how_much_memory_is_missing(seed: int):
    rng = random.Random(seed)
    problem = drawn(rng)
    problem = replace(problem, blocks=[_in_gigabytes(block) for block in problem.blocks])
    least = least_memory(all_layouts(problem), recomputation=True)
    problem = limited(problem, least * rng.uniform(0.1, 0.99))
    with pytest.raises(ConfigurationError, match=r"needs [0-9.]+ GB more on stage \d+ of") as error:
        best_layout(problem)
    missing = re.search(r"needs ([0-9.]+) GB", str(error.value))
    assert missing and float(missing[1]) == pytest.approx((least - problem.memory_limit) / GB, abs=0.006)


def _in_gigabytes(block: Block) -> Block:
    sizes = ("weights", "activations", "checkpoint", "working")
    return replace(block, **{name: GB * getattr(block, name) for name in sizes})


def test_refuses_more_stages_than_layers():
    with pytest.raises(
        ConfigurationError, match="3 layers on 5 stages x 1 virtual stages leave 2 of them empty"
    ):
        random_problem(random.Random(0), layers=3, stages=5, micro_batches=8)


def test_the_exact_planner_refuses_virtual_stages():
    with pytest.raises(ConfigurationError, match="virtual_stages is 2, expected 1"):
        exact_layout(random_problem(random.Random(0), 4, 2, 8, virtual_stages=2))


@every("few_micro_batches", [False, True])
def test_the_simulated_step_is_near_the_shortest(few_micro_batches: bool):
    rng, ratios = random.Random(1), []
    for number in range(150):
        stages = rng.randint(2, 4)
        batches = (
            rng.randint(1, 8 * stages - 1) if few_micro_batches else rng.randint(8 * stages, 16 * stages)
        )
        problem = random_problem(rng, rng.randint(stages, 7), stages, batches)
        layouts = all_layouts(problem)
        if number % 3:
            low, high = least_memory(layouts, True), best(layouts, np.inf).memory
            problem = limited(problem, low + (high - low) * rng.uniform(0.001, 1.0))
        ratios.append(_simulated(best_layout(problem)) / _shortest(problem, layouts))
    print(
        f"\nsimulated step over the shortest, few micro-batches {few_micro_batches}: worst {max(ratios):.4f}"
    )
    assert max(ratios) <= 1.02


@every(seed=range(6))
def test_the_simulated_step_is_near_the_shortest_of_thousands(seed: int):
    """Too many layouts for the search to see them all: 18 layers on 6 stages."""
    rng = random.Random(seed)
    problem = random_problem(rng, 18, 6, rng.randint(48, 96))
    layouts = [Enumerated(cuts, (0,) * 6, 0.0, 0.0) for cuts in all_cuts(problem)]
    assert _simulated(best_layout(problem)) <= 1.02 * _shortest(problem, layouts)


def _simulated(layout: Layout) -> float:
    assert max(layout.memory) <= layout.problem.memory_limit
    return simulate(layout).duration


def _shortest(problem: PipelineProblem, layouts: list[Enumerated]) -> float:
    fitting = [one for one in layouts if one.memory <= problem.memory_limit]
    cuts = np.array([one.cuts for one in fitting])
    recomputed = np.array([one.recomputed for one in fitting])
    return _durations(problem, cuts, recomputed).min()


def _durations(problem: PipelineProblem, cuts: np.ndarray, recomputed: np.ndarray) -> np.ndarray:
    """Simulated seconds; the first block that may recompute follows the embedding, so only chunk 0 is shifted."""
    forward, backward, again = (
        np.concatenate([[0.0], np.cumsum(values)])
        for values in (
            [block.forward for block in problem.blocks],
            [block.backward for block in problem.blocks],
            [block.recompute * (block.kind == "layer") for block in problem.blocks],
        )
    )
    start, stop = cuts[:, :-1], cuts[:, 1:]
    middle = start + (start == 0) * (recomputed > 0) + recomputed
    extra = again[middle] - again[start]
    return simulated_durations(
        problem, forward[stop] - forward[start], backward[stop] - backward[start] + extra
    )


def test_interleaved_layouts_are_near_the_shortest():
    """A heuristic: it may miss a layout that fits, and its step may be longer; how often and how much is printed."""
    rng, ratios, missed, feasible = random.Random(0), [], 0, 0
    for number in range(60):
        limits_memory = number % 3 > 0
        stages, virtual = (2, 2) if limits_memory else rng.choice([(2, 2), (3, 2), (2, 3)])
        layers = stages * virtual + rng.randint(0, 1 if limits_memory else 4)
        problem = random_problem(rng, layers, stages, stages * rng.choice([1, 2, 4, 8, 16]), virtual)
        if limits_memory:
            memory = max(best_layout(problem).memory)
            problem = limited(problem, memory * rng.uniform(0.6, 1.0))
        fitting = [one for one in _all_interleaved(problem) if max(one.memory) <= problem.memory_limit]
        feasible += bool(fitting)
        try:
            found = heuristic_interleaved_layout(problem)
        except ConfigurationError:
            missed += bool(fitting)
            continue
        cuts, recomputed = (
            np.array([one.cuts for one in fitting]),
            np.array([one.recomputed for one in fitting]),
        )
        ratios.append(_simulated(found) / _durations(problem, cuts, recomputed).min())
    print(f"\ninterleaved: worst {max(ratios):.4f} of {len(ratios)}, missed {missed} of {feasible} that fit")
    assert max(ratios) <= 1.05
    assert missed <= feasible / 20


def _all_interleaved(problem: PipelineProblem) -> list[Layout]:
    """All cuts, with every number of recomputed layers in every chunk where memory is limited."""
    found = []
    for cuts in all_cuts(problem):
        chunks = Layout(problem, cuts, (0,) * (len(cuts) - 1)).chunks
        most = [chunk.layers if np.isfinite(problem.memory_limit) else 0 for chunk in chunks]
        counts = itertools.product(*(range(count + 1) for count in most))
        found += [Layout(problem, cuts, recomputed) for recomputed in counts]
    return found


def test_beats_what_people_use_without_a_planner():
    rng = random.Random(0)
    for _ in range(20):
        problem = random_problem(rng, 12, 4, 32)
        planned = simulate(best_layout(problem)).duration
        assert planned <= simulate(even_layout(problem)).duration
        assert planned <= simulate(balanced_layout(problem)).duration


@pytest.mark.parametrize(
    ("layers", "stages", "micro_batches"),
    [
        (52, 12, 16),
        (52, 12, 256),
        pytest.param(200, 64, 128, marks=pytest.mark.long),
        pytest.param(200, 64, 1024, marks=pytest.mark.long),
    ],
)
def test_tries_little_of_what_there_is(
    layers: int, stages: int, micro_batches: int, monkeypatch: pytest.MonkeyPatch
):
    """Of 10^10 layouts and more, whatever the size: at most 5000 simulated, and 200 tables of stages solved."""
    problem = random_problem(random.Random(3), layers, stages, micro_batches)
    problem = limited(problem, 0.9 * max(exact_layout(problem).memory))
    tried: Counter[str] = Counter()
    ends, solve = TaskGraph.ends, exact.cheapest_cuts

    def counted_ends(graph: TaskGraph, forward: np.ndarray, *arguments: Any) -> np.ndarray:
        tried["layouts"] += len(forward)
        return ends(graph, forward, *arguments)

    def counted_solve(*arguments: Any) -> exact.Cuts | None:
        tried["tables"] += 1
        return solve(*arguments)

    monkeypatch.setattr(TaskGraph, "ends", counted_ends)
    for module in (exact, planner):
        monkeypatch.setattr(module, "cheapest_cuts", counted_solve)
    layout = best_layout(problem)
    assert 0 < tried["layouts"] <= 5000 and 0 < tried["tables"] <= 200
    assert max(layout.memory) <= problem.memory_limit
