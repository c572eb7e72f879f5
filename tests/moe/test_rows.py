"""Rows and their copies: values, gradients, and that nothing is added to rows in place, with and without fused kernels."""

from typing import Any

import pytest
import torch
from megatron.core.transformer.moe import moe_utils
from torch import Tensor, distributed

from benchmarks.fused_permutation import installed
from benchmarks.row_passes import ADDITIONS, RowPasses
from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.moe.permutation import by_capacity, by_expert
from nemo_skymoe.moe.rows import SortedCopies
from nemo_skymoe.ranks import run_ranks
from tests.cases import every
from tests.moe.edp_crafted import (
    EXPERTS,
    HIDDEN,
    PADDED,
    TOKENS,
    config_for,
    dispatch_and_combine,
    dispatcher_for,
    start,
    top_weights,
)

DISPATCHERS = ("replicated", "allgather", "alltoall")


def test_copies_and_sums_are_each_others_gradient() -> None:
    rows_P = torch.tensor([4, 0, 1, 4, 0, 4])  # rows 2 and 3 are copied nowhere
    copies = SortedCopies(rows_P, 5)
    rows = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    places = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    matrix = torch.nn.functional.one_hot(rows_P, 5).double()
    assert torch.equal(copies.copy(rows), matrix @ rows)
    assert torch.allclose(copies.sum(places), matrix.t() @ places, rtol=0, atol=1e-15)
    assert torch.autograd.gradcheck(copies.copy, rows) and torch.autograd.gradcheck(copies.sum, places)
    nothing = SortedCopies(rows_P[:0], 5)
    assert torch.equal(nothing.sum(places[:0]), torch.zeros(5, 3, dtype=torch.float64))


def test_a_sum_is_rounded_once() -> None:
    """Four addends of half a unit in the last place of 1, of which each alone is lost."""
    values = torch.tensor([1.0, *[2.0**-9] * 4]).bfloat16()[:, None].expand(-1, 8)
    assert SortedCopies(torch.zeros(5, dtype=torch.int64), 1).sum(values).tolist() == [[1 + 2.0**-7] * 8]


def kernels_of(permutation: Any, rows: Tensor) -> list[str]:
    gradient = torch.randn(rows.shape)
    with RowPasses(rows.shape[1]) as passes:
        torch.autograd.grad(permutation.unpermute(permutation.permute(rows)), rows, gradient)
    return passes.kernels


def test_nothing_is_added_to_rows_in_place() -> None:
    """On a GPU each bfloat16 addition would be an atomic one. Megatron's own permutation shows that it would be seen."""
    weights = top_weights(torch.randn(TOKENS, EXPERTS))
    rows = torch.randn(TOKENS, HIDDEN, requires_grad=True)
    for permutation in (by_expert(weights), by_capacity(weights, TOKENS)):
        kernels = kernels_of(permutation, rows)
        assert len(kernels) == 4 and ADDITIONS.isdisjoint(kernels), kernels
    with RowPasses(HIDDEN) as passes:
        copies, _, order = moe_utils.permute(rows, weights != 0, num_out_tokens=TOKENS * 3)[:3]
        torch.autograd.grad(moe_utils.unpermute(copies, order, restore_shape=rows.shape).sum(), rows)
    assert not ADDITIONS.isdisjoint(passes.kernels)


def outcomes(n: int, fused: bool) -> list[list[Tensor]]:
    """Of every dispatcher, dropless and padded and with no token anywhere: output, gradients, and calls of kernels."""
    start(n)
    found = []
    with installed() as kernels:
        for name in DISPATCHERS:
            for options, some in (({}, 1.0), (PADDED, 1.0), ({}, 0.0)):
                generator = torch.Generator().manual_seed(
                    0 if name == "replicated" else distributed.get_rank()
                )
                scores = torch.randn(TOKENS, EXPERTS, generator=generator, dtype=torch.float64)
                weights = top_weights(scores) * some
                if options:
                    weights = moe_utils.apply_router_token_dropping(weights, weights != 0, 3, 1.0)[0]
                weights.requires_grad_()
                hidden = torch.randn(
                    TOKENS, HIDDEN, generator=generator, dtype=torch.float64
                ).requires_grad_()
                config = config_for(name, n, moe_permute_fusion=fused, **options)
                kernels.calls.clear()
                output = dispatch_and_combine(dispatcher_for(config), hidden, weights)
                (output * torch.arange(HIDDEN)).sum().backward()
                pairs = 0 if not fused or not some else 2 if name == "alltoall" and not options else 1
                assert kernels.calls.count("permute") == kernels.calls.count("unpermute") == pairs, name
                assert len(kernels.calls) == 2 * pairs
                assert hidden.grad is not None and weights.grad is not None
                found.append([output.detach(), hidden.grad, weights.grad])
    return found


@every("n", (1, 2))
def test_fused_permutation_is_called_and_gives_the_same(n: int) -> None:
    for fused, plain in zip(run_ranks(outcomes, n, n, True), run_ranks(outcomes, n, n, False), strict=True):
        for ours, theirs in zip(fused, plain, strict=True):
            for found, expected in zip(ours, theirs, strict=True):
                torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-14)
        assert all(outcome[0].abs().max() > 0 for outcome in plain[::3])


def test_without_its_kernels_fusion_is_refused_by_name() -> None:
    with pytest.raises(
        ConfigurationError, match=r"moe_permute_fusion is True, expected False: .*Transformer Engine"
    ):
        config_for("alltoall", 2, moe_permute_fusion=True)
