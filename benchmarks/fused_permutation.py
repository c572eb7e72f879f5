"""Stand-ins for Transformer Engine's permutation, which needs a GPU: the same arguments and results, one kernel a call.

They are written from its documentation and share no code with nemo_skymoe. `installed` puts them where Megatron looks.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from megatron.core.transformer.moe import moe_utils
from torch import Tensor


@torch.library.custom_op("fused::gather", mutates_args=())
def gather(rows: Tensor, index: Tensor) -> Tensor:
    """Row `index[p]` at place p."""
    return rows[index]


@torch.library.custom_op("fused::gather_sum", mutates_args=())
def gather_sum(copies: Tensor, index: Tensor, num_rows: int) -> Tensor:
    """Sum of the copies of each row, in float32 at least."""
    wide = torch.promote_types(copies.dtype, torch.float32)
    total = torch.zeros(num_rows, *copies.shape[1:], dtype=wide)
    return total.index_add(0, index, copies.to(wide)).to(copies.dtype)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, index: Tensor) -> Tensor:
        ctx.index, ctx.num_rows = index, rows.shape[0]
        return gather(rows, index)

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        return gather_sum(gradients[0], ctx.index, ctx.num_rows), None


class _GatherSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, copies: Tensor, index: Tensor, num_rows: int) -> Tensor:
        ctx.index = index
        return gather_sum(copies, index, num_rows)

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        return gather(gradients[0], ctx.index), None, None


class FusedPermutation:
    """Transformer Engine's functions, and how often each was called."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def _order(self, routing_map: Tensor, num_out_tokens: int) -> Tensor:
        assert routing_map.is_contiguous() and routing_map.dtype in (torch.bool, torch.int32)
        order = routing_map.t().nonzero()[:, 1]
        assert int(num_out_tokens) == order.shape[0] > 0, "kernels return nothing for nothing"
        return order

    def permute(self, inp: Tensor, routing_map: Tensor, num_out_tokens: int = -1) -> tuple[Tensor, Tensor]:
        """Do what moe_permute does: copies by expert, then by row, and what `unpermute` needs."""
        self.calls.append("permute")
        order = self._order(routing_map, num_out_tokens)
        return apply(_Gather, inp, order), order

    def permute_with_probs(
        self, inp: Tensor, probs: Tensor, routing_map: Tensor, num_out_tokens: int = -1
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Do the same, with the weights of the copies."""
        self.calls.append("permute_with_probs")
        order = self._order(routing_map, num_out_tokens)
        weights = probs.t()[routing_map.t().bool()]
        return apply(_Gather, inp, order), weights, order

    def unpermute(
        self, inp: Tensor, row_id_map: Tensor, merging_probs: Any = None, restore_shape: Any = None, **_: Any
    ) -> Tensor:
        """Do what moe_unpermute does without weights."""
        self.calls.append("unpermute")
        assert merging_probs is None and inp.shape[0] == row_id_map.shape[0] > 0
        return apply(_GatherSum, inp, row_id_map, restore_shape[0])

    def sort_chunks(self, inp: Tensor, split_sizes: Tensor, sorted_index: Tensor) -> Tensor:
        """Do what moe_sort_chunks_by_index does."""
        self.calls.append("sort_chunks")
        chunks = torch.arange(inp.shape[0]).split(split_sizes.tolist())
        return apply(_Gather, inp, torch.cat([chunks[index] for index in sorted_index.tolist()]))

    def sort_chunks_with_probs(
        self, inp: Tensor, probs: Tensor, split_sizes: Tensor, sorted_index: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Do the same, with the weights of the rows."""
        sorted_rows = self.sort_chunks(inp, split_sizes, sorted_index)
        chunks = torch.arange(inp.shape[0]).split(split_sizes.tolist())
        return sorted_rows, probs[torch.cat([chunks[index] for index in sorted_index.tolist()])]


@contextmanager
def installed() -> Iterator[FusedPermutation]:
    """Let Megatron find the stand-ins where it looks for Transformer Engine."""
    found = FusedPermutation()
    names = {
        "HAVE_TE": True,
        "fused_permute": found.permute,
        "fused_permute_with_probs": found.permute_with_probs,
        "fused_permute_and_pad_with_probs": None,
        "fused_unpermute": found.unpermute,
        "fused_sort_chunks_by_index": found.sort_chunks,
        "fused_sort_chunks_by_index_with_probs": found.sort_chunks_with_probs,
        "is_te_min_version": lambda *_, **__: False,
    }
    with ExitStack() as patches:
        for name, value in names.items():
            patches.enter_context(mock.patch.object(moe_utils, name, value, create=True))
        yield found


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """Call an autograd function."""
    return function.apply(*args)
