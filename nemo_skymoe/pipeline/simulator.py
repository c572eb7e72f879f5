"""An event simulation of one step of 1F1B and interleaved 1F1B in Megatron's order."""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from nemo_skymoe.pipeline.layout import Layout
from nemo_skymoe.pipeline.problem import PipelineProblem
from nemo_skymoe.pipeline.task_graph import task_graph

_LARGEST_BATCH = 4_000_000  # ends of nodes held at a time: 32 MB


class Event(NamedTuple):
    """One action of a stage from `start` to `end`, in seconds; `kind` is `forward`, `recompute` or `backward`.

    `chunk` counts the stage's virtual stages. The recomputation of a backward is drawn as one event in front of it.
    Megatron recomputes layer by layer inside the backward, which takes as long.
    """

    stage: int
    chunk: int
    micro_batch: int
    kind: str
    start: float
    end: float


@dataclass(frozen=True)
class Simulation:
    """One simulated step of a layout."""

    layout: Layout
    events: tuple[Event, ...]
    """Events ordered by stage, then by time. Idle time and communication are the gaps between them."""

    @cached_property
    def duration(self) -> float:
        """Seconds from the first forward to the last backward."""
        return max(event.end for event in self.events)

    @property
    def step_time(self) -> float:
        """Seconds of a step: the pipeline, and the problem's tail."""
        return self.duration + self.layout.problem.tail

    @property
    def bubble_fraction(self) -> float:
        """Share of all stages' time in the pipeline during which they compute nothing; communication counts as such."""
        busy = sum(event.end - event.start for event in self.events)
        return 1.0 - busy / (self.duration * self.layout.problem.stages)


def simulate(layout: Layout) -> Simulation:
    """Return every event of one step of `layout`."""
    problem, chunks = layout.problem, layout.chunks
    graph = task_graph(problem.stages, problem.virtual_stages, problem.micro_batches)
    forward = np.array([[chunk.forward for chunk in chunks]])
    backward = np.array([[chunk.recompute + chunk.backward for chunk in chunks]])
    ends = graph.ends(forward, backward, problem.transfer)[:, 0].tolist()
    events: list[Event] = []
    for (stage, operation), end in zip(graph.operations, ends, strict=True):
        if operation is None:
            continue
        kind, index, micro_batch = operation
        chunk = chunks[index * problem.stages + stage]
        start = end - (chunk.forward if kind == "forward" else chunk.backward)
        if kind == "backward" and chunk.recompute:
            events.append(Event(stage, index, micro_batch, "recompute", start - chunk.recompute, start))
        events.append(Event(stage, index, micro_batch, kind, start, end))
    return Simulation(layout, tuple(sorted(events, key=lambda event: event.stage)))


def simulated_durations(problem: PipelineProblem, forward: np.ndarray, backward: np.ndarray) -> np.ndarray:
    """Return the seconds that the pipeline takes with each of many layouts, [layouts].

    Args:
        problem: The problem that all layouts solve.
        forward: Seconds of the chunks' forward passes, [layouts, chunks].
        backward: Seconds of the chunks' backward passes with recomputation, [layouts, chunks].
    """
    graph = task_graph(problem.stages, problem.virtual_stages, problem.micro_batches)
    size = max(1, _LARGEST_BATCH // len(graph.operations))
    parts = [
        graph.ends(forward[first : first + size], backward[first : first + size], problem.transfer).max(
            axis=0
        )
        for first in range(0, len(forward), size)
    ]
    return np.concatenate(parts) if parts else np.zeros(0)


def lower_bounds(problem: PipelineProblem, forward: np.ndarray, backward: np.ndarray) -> np.ndarray:
    """Return seconds that no schedule can beat, [layouts]. The arguments are those of `simulated_durations`.

    A stage runs all its micro-batches. It begins after the first has come through the stages before it, and ends before
    the last has gone back through them.
    """
    chunks = (forward + backward).reshape(len(forward), problem.virtual_stages, problem.stages)
    before = np.pad(np.cumsum(chunks[:, 0, :-1], axis=1), ((0, 0), (1, 0)))
    return (problem.micro_batches * chunks.sum(axis=1) + before).max(axis=1)
