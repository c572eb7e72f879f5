"""Orders and micro-batches in flight against Megatron's own schedule functions."""

from types import SimpleNamespace

from megatron.core.pipeline_parallel import schedules
from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches, get_schedule_table

from nemo_skymoe.pipeline.schedule import in_flight, stage_order, warm_up_length
from tests.cases import every

SHAPES = [
    (stages, virtual, groups * stages)
    for stages in (2, 3, 4, 8)
    for virtual in (1, 2, 3)
    for groups in (1, 2, 5)
]


def megatron_warm_up(stage: int, stages: int, virtual: int, micro_batches: int) -> int:
    communicator = SimpleNamespace(
        pp_group=SimpleNamespace(size=lambda: stages, rank=lambda: stage),
        virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
    )
    _, _, warm_up, _ = get_pp_rank_microbatches(micro_batches, virtual, stages, p2p_communicator=communicator)
    return warm_up


def megatron_order(warm_up: int, virtual: int, table: list[tuple[int, int]]) -> list[int]:
    """Chunks from 1 in the order of Megatron's schedule, negative for a backward pass.

    Up to 0.15 Megatron has a function for it, and later the same in the loops of the schedule.
    """
    forward = [chunk + 1 for _, chunk in table]
    backward = [chunk - virtual for _, chunk in table]
    steady = [one for pair in zip(forward[warm_up:], backward, strict=False) for one in pair]
    order = [*forward[:warm_up], *steady, *backward[len(table) - warm_up :]]
    function = getattr(schedules, "convert_schedule_table_to_order", None)
    assert function is None or function(warm_up, virtual, table) == order
    return order


@every(("stages", "virtual", "micro_batches"), SHAPES)
def test_is_the_order_of_megatron(stages: int, virtual: int, micro_batches: int):
    for stage in range(stages):
        warm_up = megatron_warm_up(stage, stages, virtual, micro_batches)
        assert warm_up_length(stage, stages, virtual, micro_batches) == warm_up
        table = get_schedule_table(micro_batches, virtual, stages)
        expected = megatron_order(warm_up, virtual, table)
        order = stage_order(stage, stages, virtual, micro_batches)
        signed = [
            operation.chunk + 1 if operation.kind == "forward" else -operation.chunk - 1
            for operation in order
        ]
        assert signed == expected
        for kind in ("forward", "backward"):
            ran = [operation.micro_batch for operation in order if operation.kind == kind]
            assert ran == [micro_batch for micro_batch, _ in table]


def test_every_backward_follows_its_forward():
    for stages, virtual, micro_batches in SHAPES:
        for stage in range(stages):
            order = stage_order(stage, stages, virtual, micro_batches)
            assert len(set(order)) == 2 * virtual * micro_batches
            for operation in order:
                if operation.kind == "backward":
                    assert order.index(operation._replace(kind="forward")) < order.index(operation)


@every(("stages", "micro_batches"), [(4, 1), (4, 3), (4, 4), (12, 100)])
def test_micro_batches_in_flight_with_1f1b(stages: int, micro_batches: int):
    for stage in range(stages):
        ((held, running),) = in_flight(stage, stages, 1, micro_batches)
        assert (held, running) == ((min(micro_batches, stages - stage) - 1,), 0)


def test_micro_batches_in_flight_when_interleaved():
    """The last stage of two with two chunks holds three before its first backward, which frees one of chunk 1."""
    moments = in_flight(1, 2, 2, 8)
    assert max(sum(held) + 1 for held, _ in moments) == megatron_warm_up(1, 2, 2, 8) + 1
    assert max(sum(held) + 1 for held, _ in in_flight(0, 2, 2, 8)) == megatron_warm_up(0, 2, 2, 8) + 1
