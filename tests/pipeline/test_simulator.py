"""The simulated step: closed forms where stages are alike, bounds and dependencies everywhere."""

import random
from itertools import pairwise

import numpy as np
import pytest

from nemo_skymoe.pipeline.layout import Layout
from nemo_skymoe.pipeline.problem import Block, PipelineProblem
from nemo_skymoe.pipeline.schedule import stage_order
from nemo_skymoe.pipeline.simulator import Simulation, lower_bounds, simulate, simulated_durations
from nemo_skymoe.pipeline.task_graph import task_graph
from tests.calls import count_calls
from tests.cases import every
from tests.pipeline.objective import estimate
from tests.pipeline.random_problems import all_cuts, random_problem

FORWARD, BACKWARD = 1.0, 2.0


def alike(stages: int, virtual: int, micro_batches: int, transfer: float = 0.0, tail: float = 0.0) -> Layout:
    """Every chunk one layer."""
    chunks = stages * virtual
    blocks = [Block("layer", FORWARD, BACKWARD, 1.0, 1.0)] * chunks
    problem = PipelineProblem(blocks, stages, micro_batches, 1e9, virtual, transfer, tail)
    return Layout(problem, tuple(range(chunks + 1)), (0,) * chunks)


def drawn(rng: random.Random) -> Layout:
    virtual = rng.choice([1, 1, 2, 3])
    stages = rng.randint(2 if virtual > 1 else 1, 4)
    micro_batches = stages * rng.randint(1, 4) if virtual > 1 else rng.randint(1, 16)
    problem = random_problem(rng, stages * virtual + rng.randint(0, 2), stages, micro_batches, virtual)
    cuts = rng.choice(all_cuts(problem))
    free = Layout(problem, cuts, (0,) * (len(cuts) - 1))
    return Layout(problem, cuts, tuple(rng.randint(0, chunk.layers) for chunk in free.chunks))


@every(stages=[1, 2, 3, 4, 7], micro_batches=[1, 2, 3, 4, 6, 7, 8, 30])
def test_1f1b_is_the_closed_form(stages: int, micro_batches: int):
    layout = alike(stages, 1, micro_batches)
    simulation = simulate(layout)
    assert simulation.duration == (micro_batches + stages - 1) * (FORWARD + BACKWARD) == estimate(layout)
    assert simulation.bubble_fraction == pytest.approx((stages - 1) / (micro_batches + stages - 1))


@every(stages=[2, 3, 4, 6], virtual=[2, 3, 4], groups=[1, 2, 3, 4])
def test_interleaved_1f1b_is_the_closed_form(stages: int, virtual: int, groups: int):
    layout = alike(stages, virtual, groups * stages)
    stage_time = virtual * (FORWARD + BACKWARD)
    bubble = (stages - 1) * stage_time / virtual
    assert (
        simulate(layout).duration == groups * stages * stage_time + bubble == pytest.approx(estimate(layout))
    )


@every(stages=[3, 4, 7], micro_batches=[2, 3, 8, 30])
def test_1f1b_waits_for_transfers(stages: int, micro_batches: int):
    """Two exchanges a micro-batch on an inner stage, one less in all, for the step ends with the first stage's."""
    transfer = 0.25
    layout = alike(stages, 1, micro_batches, transfer)
    exchanges = 2 * (micro_batches - 1) + 2 * (stages - 1)
    assert estimate(layout) == (micro_batches + stages - 1) * (FORWARD + BACKWARD) + exchanges * transfer
    assert simulate(layout).duration == estimate(layout) - transfer


def test_two_stages_by_hand():
    """Forwards 1 and 2, backwards 1 and 3 seconds, two micro-batches, transfers of half a second."""
    blocks = [Block("layer", 1.0, 1.0, 1.0, 1.0), Block("layer", 2.0, 3.0, 1.0, 1.0)]
    layout = Layout(PipelineProblem(blocks, 2, 2, 1e9, transfer=0.5), (0, 1, 2), (0, 0))
    times = {(event.stage, event.kind, event.micro_batch): event.start for event in simulate(layout).events}
    assert times[0, "forward", 0] == 0.0
    assert times[0, "forward", 1] == 1.5  # after sending micro-batch 0
    assert times[1, "forward", 0] == 1.5
    assert times[1, "backward", 0] == 3.5
    assert times[1, "forward", 1] == 7.0  # after exchanging gradient 0 for activation 1
    assert times[0, "backward", 0] == 7.0
    assert times[1, "backward", 1] == 9.0
    assert times[0, "backward", 1] == 12.5


@every(seed=range(60))
def test_is_never_below_the_lower_bound(seed: int):
    layout = drawn(random.Random(seed))
    forward = np.array([[chunk.forward for chunk in layout.chunks]])
    backward = np.array([[chunk.recompute + chunk.backward for chunk in layout.chunks]])
    duration = simulate(layout).duration
    (bound,) = lower_bounds(layout.problem, forward, backward)
    compute = [
        sum(c.forward + c.recompute + c.backward for c in layout.chunks_of(s))
        for s in range(layout.problem.stages)
    ]
    assert duration * (1 + 1e-9) >= bound >= layout.problem.micro_batches * max(compute) * (1 - 1e-9)
    assert simulated_durations(layout.problem, forward, backward)[0] == pytest.approx(duration, rel=1e-12)


@every(seed=range(60))
def test_events_keep_order_and_wait_for_their_input(seed: int):
    layout = drawn(random.Random(seed))
    problem, simulation = layout.problem, simulate(layout)
    chunks, delay = problem.stages * problem.virtual_stages, problem.transfer - 1e-9
    spans = _spans(simulation)
    for stage in range(problem.stages):
        events = [event for event in simulation.events if event.stage == stage]
        assert all(one.end <= other.start + 1e-9 for one, other in pairwise(events))
        ran = [(event.kind, event.chunk, event.micro_batch) for event in events if event.kind != "recompute"]
        assert ran == stage_order(stage, problem.stages, problem.virtual_stages, problem.micro_batches)
    for (kind, chunk, micro_batch), (start, _) in spans.items():
        source = chunk - 1 if kind == "forward" else chunk + 1
        if 0 <= source < chunks:
            assert start >= spans[kind, source, micro_batch][1] + delay
        if kind == "backward":
            assert start >= spans["forward", chunk, micro_batch][1] - 1e-9


def _spans(simulation: Simulation) -> dict[tuple[str, int, int], tuple[float, float]]:
    """Start and end of every operation, by kind, chunk of the model and micro-batch; recomputation in backward."""
    problem, spans = simulation.layout.problem, {}
    for event in simulation.events:
        kind = "forward" if event.kind == "forward" else "backward"
        key = kind, event.chunk * problem.stages + event.stage, event.micro_batch
        spans[key] = (spans[key][0] if key in spans else event.start, event.end)
    assert len(spans) == 2 * problem.stages * problem.virtual_stages * problem.micro_batches
    return spans


def test_recomputation_is_an_event_of_its_own():
    blocks = [Block("layer", 1.0, 2.0, 1.0, 2.0, checkpoint=1.0, recompute=0.5)] * 4
    layout = Layout(PipelineProblem(blocks, 2, 4, 1e9), (0, 2, 4), (2, 0))
    simulation = simulate(layout)
    recomputed = [event for event in simulation.events if event.kind == "recompute"]
    assert [(event.stage, event.micro_batch, event.end - event.start) for event in recomputed] == [
        (0, micro_batch, pytest.approx(1.0)) for micro_batch in range(4)
    ]


def test_the_tail_is_part_of_the_step_and_not_of_the_pipeline():
    simulation = simulate(alike(2, 1, 4, tail=0.5))
    assert simulation.step_time == simulation.duration + 0.5


def test_layouts_share_one_graph_and_one_pass():
    """Ranking 32 layouts takes the calls that one takes; a graph is built once, in proportion to the micro-batches."""
    problem = alike(12, 1, 256).problem
    times = np.random.default_rng(0).uniform(1, 2, (32, 12))
    build = task_graph.__wrapped__
    simulated_durations(problem, times, 2 * times)
    one, many = (
        count_calls(lambda some=some: simulated_durations(problem, some, 2 * some))
        for some in (times[:1], times)
    )
    assert one == many < 100
    few, twice = (count_calls(lambda m=m: build(12, 1, m)) for m in (128, 256))
    assert 1.9 * few < twice < 2.1 * few
