"""What the host reads once per layer and micro-batch is not read again by recomputation."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from nemo_skymoe.moe.controller import AuxLossController, find_routers
from nemo_skymoe.moe.expert_group import ExpertGroup
from nemo_skymoe.moe.kept_reads import KeptReads
from nemo_skymoe.ranks import run_ranks
from tests.cases import every
from tests.moe import edp_worlds
from tests.moe.edp_worlds import Case
from tests.moe.worlds import build, configuration, groups, on_ranks

CASES = [
    Case(2, name, recompute=recompute, overlap=overlap)
    for name in ("replicated", "allgather", "alltoall")
    for recompute in ("full", "moe")
    for overlap in (False, True)
]


def reads_and_gradients(case: Case) -> tuple[int, list[Tensor]]:
    """Of two micro-batches, both forward before either goes backward, as in a pipeline."""
    model = edp_worlds.build(case)
    read: Callable[..., Tensor] = ExpertGroup.read
    count = 0

    def counted(self: ExpertGroup, tensor: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return read(self, tensor)

    with mock.patch.object(ExpertGroup, "read", counted):
        losses = [
            edp_worlds.loss(edp_worlds.forward(model, case, index, 1), case, index, 1) for index in range(2)
        ]
        for loss in losses:
            loss.backward()
    assert not any(layer.mlp.router.kept_reads._waiting for layer in model.decoder.layers)
    return count, [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def compared(cases: list[Case]) -> list[tuple[int, int, float]]:
    """Of every case the reads with and without recomputation, and the largest difference of a gradient."""
    edp_worlds.start_world()
    found = []
    with edp_worlds.layout(cases[0]):
        for case in cases:
            again, recomputed = reads_and_gradients(case)
            once, kept = reads_and_gradients(replace(case, recompute=None))
            worst = max(float((a - b).norm() / b.norm()) for a, b in zip(recomputed, kept, strict=True))
            found.append((again, once, worst))
    return found


def test_recomputation_waits_no_more_than_the_forward_pass() -> None:
    for rank in run_ranks(compared, 2, CASES):
        for case, (again, once, worst) in zip(CASES, rank, strict=True):
            # Two layers, two micro-batches.
            assert again == once == 4, case.name
            assert worst <= 1e-12, case.name


def recomputed(reads: KeptReads, first: list[int], second: list[int]) -> Tensor:
    """Read in a forward pass without gradients, and again in its backward pass."""
    counts = [torch.tensor(first), torch.tensor(second)]

    class Recomputed(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, value: Tensor) -> Tensor:
            reads.read(counts[0], counts[0].clone, training=True, where="MoE layer 7")
            return value.clone()

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Tensor:
            with torch.enable_grad():
                return gradients[0] * reads.read(counts[1], refuse, training=True, where="MoE layer 7").sum()

    function: Any = Recomputed
    value = torch.ones(1, requires_grad=True)
    function.apply(value).backward()
    assert value.grad is not None
    return value.grad


def refuse() -> Tensor:
    raise AssertionError("read again")


def test_another_routing_the_second_time_is_an_error_that_names_the_layer() -> None:
    assert recomputed(KeptReads(), [3, 4], [3, 4]).item() == 7
    with pytest.raises(RuntimeError, match="MoE layer 7: recomputation routes a micro-batch differently"):
        recomputed(KeptReads(), [3, 4], [4, 3])


@every(("training", "gradients"), [(False, False), (True, True)])
def test_nothing_is_kept_of_evaluation_or_where_nothing_is_recomputed(
    training: bool, gradients: bool
) -> None:
    reads = KeptReads()
    with torch.set_grad_enabled(gradients):
        reads.read(torch.ones(1), lambda: torch.ones(1), training, "")
    assert not reads._waiting


@on_ranks(1)
def test_a_step_leaves_nothing_behind() -> None:
    with groups():
        chunks = build(configuration())
        controller = AuxLossController(chunks)
        for router in find_routers(chunks).values():
            with torch.no_grad():
                router.kept_reads.read(torch.ones(1), lambda: torch.ones(1), True, "")
            assert router.kept_reads._waiting
        controller.collect()
        assert not any(router.kept_reads._waiting for router in find_routers(chunks).values())
