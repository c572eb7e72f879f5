"""Copy rows to places and sum the copies of each row. Either is the other's gradient, and neither adds in place.

Adding rows to rows in place, as `index_add` does, makes a GPU add bfloat16 atomically: each addition is rounded, and in an
order that differs from run to run. Here the copies of a row are sorted, one thread gathers and sums them in float32, and
the sum is rounded once. Shape suffixes: R rows, P places, E experts, H hidden.
"""

from typing import Any

import torch
from megatron.core.transformer.moe import moe_utils
from torch import Tensor


class SortedCopies:
    """Copies of rows by plain gathers.

    Args:
        rows_P: For each place, the row that it copies.
        num_rows: R.
    """

    def __init__(self, rows_P: Tensor, num_rows: int) -> None:
        self._rows_P = rows_P
        self._sorted_rows_P, self._places_P = rows_P.sort(stable=True)
        self._starts_R = torch.searchsorted(self._sorted_rows_P, torch.arange(num_rows, device=rows_P.device))

    def copy(self, rows_RH: Tensor) -> Tensor:
        """Copy rows [R, H] to their places, [P, H]."""
        return _apply(_Copy, rows_RH, self)

    def sum(self, copies_PH: Tensor) -> Tensor:
        """Sum the copies [P, H] of each row to [R, H], in the copies' dtype."""
        return _apply(_Sum, copies_PH, self)

    def gather(self, rows_RH: Tensor) -> Tensor:
        """Do what `copy` does, without a gradient."""
        return rows_RH.index_select(0, self._rows_P)

    def gather_sums(self, copies_PH: Tensor) -> Tensor:
        """Do what `sum` does, without a gradient."""
        if copies_PH.shape[0] == 0:
            return copies_PH.new_zeros(self._starts_R.shape[0], copies_PH.shape[1])
        return torch.nn.functional.embedding_bag(
            self._places_P, copies_PH.contiguous(), self._starts_R, mode="sum"
        )


class FusedCopies:
    """The same by Megatron's fused permutation, whose kernels are Transformer Engine's (`moe_permute_fusion`).

    Args:
        map_RE: True where an expert takes a row. Places are in the order of experts, and then of rows.
        num_copies: P, at least 1: of nothing the kernels return nothing, instead of rows of zeros.
    """

    def __init__(self, map_RE: Tensor, num_copies: int) -> None:
        self._map_RE = map_RE.contiguous()
        self._num_copies = num_copies
        self._order: Tensor | None = None
        self._shape: Any = None

    def copy(self, rows_RH: Tensor) -> Tensor:
        """Copy rows [R, H] to their places, [P, H]."""
        self._shape = rows_RH.shape
        # megatron-core 0.17 returns five values, of which the first three are those of older versions.
        copies_PH, _, self._order = moe_utils.permute(
            rows_RH, self._map_RE, num_out_tokens=self._num_copies, fused=True
        )[:3]
        return copies_PH

    def sum(self, copies_PH: Tensor) -> Tensor:
        """Sum the copies [P, H] of each row to [R, H]. The rows have been copied before."""
        assert self._order is not None
        return moe_utils.unpermute(
            copies_PH, self._order, restore_shape=self._shape, routing_map=self._map_RE, fused=True
        )


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_RH: Tensor, copies: SortedCopies) -> Tensor:
        ctx.copies = copies
        return copies.gather(rows_RH)

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        return ctx.copies.gather_sums(gradients[0]), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, copies_PH: Tensor, copies: SortedCopies) -> Tensor:
        ctx.copies = copies
        return copies.gather_sums(copies_PH)

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        return ctx.copies.gather(gradients[0]), None


def _apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    return function.apply(*args)
