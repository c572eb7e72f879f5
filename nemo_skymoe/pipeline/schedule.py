"""The order in which Megatron-Core runs micro-batches on a stage, for 1F1B and interleaved 1F1B.

The source is `megatron.core.pipeline_parallel.schedules` (0.15.3): `forward_backward_pipelining_without_interleaving`,
`forward_backward_pipelining_with_interleaving`, `get_pp_rank_microbatches` and `get_schedule_table`.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple


class Operation(NamedTuple):
    """One pass of one micro-batch through one of a stage's chunks; `kind` is `forward` or `backward`."""

    kind: str
    chunk: int
    micro_batch: int


class InFlight(NamedTuple):
    """A moment of a stage's schedule: the micro-batches that each chunk holds, and the chunk that runs."""

    held: tuple[int, ...]
    running: int


def stage_order(stage: int, stages: int, virtual_stages: int, micro_batches: int) -> list[Operation]:
    """Return the forwards and backwards of one stage in Megatron's order: warm-up, steady state, cool-down."""
    table = list(_units(stages, virtual_stages, micro_batches))
    forwards = [Operation("forward", chunk, micro_batch) for micro_batch, chunk in table]
    backwards = [
        Operation("backward", virtual_stages - 1 - chunk, micro_batch) for micro_batch, chunk in table
    ]
    warm_up = warm_up_length(stage, stages, virtual_stages, micro_batches)
    order = forwards[:warm_up]
    for forward, backward in zip(forwards[warm_up:], backwards, strict=False):
        order += (forward, backward)
    return order + backwards[len(forwards) - warm_up :]


def warm_up_length(stage: int, stages: int, virtual_stages: int, micro_batches: int) -> int:
    """Return the number of forwards that a stage runs before its first backward follows a forward."""
    after = stages - 1 - stage
    length = after if virtual_stages == 1 else 2 * after + (virtual_stages - 1) * stages
    return min(length, micro_batches * virtual_stages)


def _units(stages: int, virtual_stages: int, micro_batches: int) -> Iterator[tuple[int, int]]:
    """Yield (micro-batch, chunk) pairs. Groups of `stages` micro-batches go through all chunks of a stage in turn."""
    for first in range(0, micro_batches, stages):
        for chunk in range(virtual_stages):
            for micro_batch in range(first, min(first + stages, micro_batches)):
                yield micro_batch, chunk


@lru_cache(maxsize=1024)
def in_flight(stage: int, stages: int, virtual_stages: int, micro_batches: int) -> tuple[InFlight, ...]:
    """Return the moments at which a stage can need most memory.

    With 1F1B there is one: min(m, P - stage) - 1 micro-batches are held, and one runs.
    """
    held = [0] * virtual_stages
    moments: set[InFlight] = set()
    for kind, chunk, _ in stage_order(stage, stages, virtual_stages, micro_batches):
        held[chunk] -= kind == "backward"
        moments.add(InFlight(tuple(held), chunk))
        held[chunk] += kind == "forward"
    return tuple(moment for moment in moments if not any(_exceeds(other, moment) for other in moments))


def _exceeds(other: InFlight, moment: InFlight) -> bool:
    return (
        other != moment
        and other.running == moment.running
        and all(theirs >= ours for theirs, ours in zip(other.held, moment.held, strict=True))
    )
