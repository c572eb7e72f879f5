"""The order in which the operations of a step of 1F1B or interleaved 1F1B wait for each other, timed for many layouts
at once.

1F1B exchanges activations and gradients between neighbours in blocking calls (`send_forward_recv_backward` and its
siblings): both sides wait for the later one, and then for the transfer. Interleaved 1F1B is taken with
`overlap_p2p_comm`: a transfer delays its receiver and blocks nobody.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise

import numpy as np

from nemo_skymoe.pipeline.schedule import Operation, stage_order, warm_up_length


@dataclass(frozen=True)
class TaskGraph:
    """Operations and exchanges in waves. A node starts when two nodes of earlier waves have ended.

    The nodes' arrays are in the order of the waves. The predecessor -1 is the start of the step.
    """

    operations: list[tuple[int, Operation | None]]
    """Stage and operation of each node. None is an exchange with the next stage."""
    duration: np.ndarray
    """The row of the durations that each node takes: c for the forward of chunk c, C + c for its backward, 2 C for an
    exchange."""
    before: np.ndarray
    other: np.ndarray
    delayed: np.ndarray
    """True if the result of `other` still has to be transferred."""
    waves: list[int]
    """First node of every wave, and then the number of nodes."""

    def ends(self, forward: np.ndarray, backward: np.ndarray, transfer: float) -> np.ndarray:
        """Return the ends of the nodes, [nodes, layouts], from the chunks' times, [layouts, chunks], in seconds."""
        exchange = np.full((len(forward), 1), transfer)
        durations = np.ascontiguousarray(np.concatenate([forward, backward, exchange], axis=1).T)
        ends = np.zeros((len(self.operations) + 1, len(forward)))
        lag = (self.delayed * transfer)[:, None]
        for first, stop in pairwise(self.waves):
            start = ends[self.other[first:stop]] + lag[first:stop]
            np.maximum(start, ends[self.before[first:stop]], out=start)
            np.add(start, durations[self.duration[first:stop]], out=ends[first:stop])
        return ends[:-1]


@lru_cache(maxsize=8)
def task_graph(stages: int, virtual_stages: int, micro_batches: int) -> TaskGraph:
    """Return the graph of one step. It depends on P, v and m, and not on the layout."""
    orders = [stage_order(stage, stages, virtual_stages, micro_batches) for stage in range(stages)]
    nodes = _Nodes(stages, virtual_stages)
    if virtual_stages > 1:
        return nodes.run(orders)
    return nodes.run([_with_exchanges(order, stage, stages) for stage, order in enumerate(orders)])


def _with_exchanges(order: Sequence[Operation], stage: int, stages: int) -> list[Operation | int]:
    """Return a stage's operations with its exchanges, which are named by the stage on the near side.

    The order is receive, compute, send. If a send and the next receive are with the same neighbour they are one call,
    except if the stage has no steady state.
    """
    all_in_warm_up = warm_up_length(stage, stages, 1, len(order) // 2) == len(order) // 2
    program: list[Operation | int] = []
    for operation in order:
        receive, send = (stage - 1, stage) if operation.kind == "forward" else (stage, stage - 1)
        turns = all_in_warm_up and operation == Operation("backward", 0, 0)
        if not program or program[-1] != receive or turns:
            program.append(receive)
        program += [operation, send]
    return [item for item in program if isinstance(item, Operation) or 0 <= item < stages - 1]


@dataclass
class _Nodes:
    """Runs the stages' programs side by side. A node whose predecessors have all been added enters the next wave."""

    stages: int
    virtual_stages: int
    operations: list[tuple[int, Operation | None]] = field(default_factory=list)
    rows: list[tuple[int, int, int, bool]] = field(default_factory=list)
    ended: dict[tuple[str, int, int], int] = field(default_factory=dict)

    def run(self, programs: Sequence[Sequence[Operation | int]]) -> TaskGraph:
        """Return the graph of all programs, and assert that no stage waits for ever."""
        last, position, waves = [-1] * self.stages, [0] * self.stages, [0]
        while any(index < len(program) for program, index in zip(programs, position, strict=True)):
            items = [
                program[index] if index < len(program) else None
                for program, index in zip(programs, position, strict=True)
            ]
            for stage, item in enumerate(items):
                if isinstance(item, Operation):
                    touched = [stage] if self._compute(stage, item, last[stage], waves[-1]) else []
                elif item == stage and items[stage + 1] == stage:
                    self._add((stage, None), 2 * self._chunks, last[stage], last[stage + 1])
                    touched = [stage, stage + 1]
                else:
                    touched = []
                for place in touched:
                    last[place] = len(self.rows) - 1
                    position[place] += 1
            assert len(self.rows) > waves[-1], "the stages wait for each other: the schedule's order is wrong"
            waves.append(len(self.rows))
        duration, before, other, delayed = (np.array(column) for column in zip(*self.rows, strict=True))
        return TaskGraph(self.operations, duration, before, other, delayed, waves)

    @property
    def _chunks(self) -> int:
        return self.stages * self.virtual_stages

    def _compute(self, stage: int, operation: Operation, before: int, wave: int) -> bool:
        """Add an operation, if another stage has made its input in an earlier wave, and say whether it was added."""
        kind, index, micro_batch = operation
        chunk = index * self.stages + stage
        source = chunk - 1 if kind == "forward" else chunk + 1
        other, delayed = before, False
        if self.virtual_stages > 1 and 0 <= source < self._chunks:
            other, delayed = self.ended.get((kind, source, micro_batch), wave), True
            if other >= wave:
                return False
        self.ended[kind, chunk, micro_batch] = len(self.rows)
        row = chunk if kind == "forward" else self._chunks + chunk
        self._add((stage, operation), row, before, other, delayed)
        return True

    def _add(
        self,
        operation: tuple[int, Operation | None],
        duration: int,
        before: int,
        other: int,
        delayed: bool = False,
    ) -> None:
        self.operations.append(operation)
        self.rows.append((duration, before, other, delayed))
