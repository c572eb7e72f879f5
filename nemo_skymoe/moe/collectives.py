"""Differentiable collectives over the ranks that share a layer's experts. A failure names the layer and the group.

Megatron's own collectives (tensor_parallel/mappings.py) return an unreduced tensor for a non-contiguous input up to
0.18, and their failures say neither which layer nor which group it was.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup


class CollectiveFailed(RuntimeError):
    """A collective of an MoE layer did not complete. The message names the layer, the collective and the group."""


class ExpertGroup:
    """The ranks that share a layer's experts, and the collectives among them.

    Every method returns a new contiguous tensor, or the tensor itself if the group is one rank. It raises
    `CollectiveFailed` if another rank of the group has died or does not take part within the group's timeout.

    Args:
        group: The EDP group: Megatron's tensor-parallel or expert-parallel group, whose ranks are the same.
        layer_number: Returns the number of the layer. It is called only when a collective has failed.
    """

    def __init__(self, group: ProcessGroup, layer_number: Callable[[], int | None]) -> None:
        self.group = group
        self.size = group.size()
        self.rank = group.rank()
        self._layer_number = layer_number

    def __str__(self) -> str:
        ranks = distributed.get_process_group_ranks(self.group)
        return f"MoE layer {self._layer_number()}, EDP group of ranks {ranks}"

    @contextmanager
    def _named(self, collective: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise CollectiveFailed(
                f"{self}: {collective} failed on rank {distributed.get_rank()}, a partner has died or is late: {error}"
            ) from error

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Return the sum over the ranks."""
        if self.size == 1:
            return tensor
        result = tensor.clone(memory_format=torch.contiguous_format)
        with self._named("all-reduce"):
            distributed.all_reduce(result, group=self.group)
        return result

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Concatenate each rank's [r, ...] to [size * r, ...], in rank order."""
        if self.size == 1:
            return tensor
        result = tensor.new_empty(self.size * tensor.shape[0], *tensor.shape[1:])
        with self._named("all-gather"):
            _gather_into(result, tensor.contiguous(), group=self.group)
        return result

    def reduce_scatter(self, tensor: Tensor) -> Tensor:
        """Sum [size * r, ...] over the ranks, and return this rank's part [r, ...] of the sum."""
        if self.size == 1:
            return tensor
        result = tensor.new_empty(tensor.shape[0] // self.size, *tensor.shape[1:])
        with self._named("reduce-scatter"):
            _reduce_scatter_into(result, tensor.contiguous(), group=self.group)
        return result

    def all_to_all(
        self, tensor: Tensor, received: Sequence[int] | None = None, sent: Sequence[int] | None = None
    ) -> Tensor:
        """Send the i-th piece of dimension 0 to rank i.

        Args:
            tensor: [sum(sent), ...].
            received: The number of rows from each rank; None for equal pieces.
            sent: The number of rows to each rank; None for equal pieces.

        Returns:
            [sum(received), ...].
        """
        if self.size == 1:
            return tensor
        rows = tensor.shape[0] if received is None else sum(received)
        result = tensor.new_empty(rows, *tensor.shape[1:])
        with self._named("all-to-all"):
            distributed.all_to_all_single(
                result, tensor.contiguous(), _list(received), _list(sent), group=self.group
            )
        return result


def _list(splits: Sequence[int] | None) -> list[int] | None:
    return None if splits is None else list(splits)


def _gather_into(*args: Any, **kwargs: Any) -> None:
    # torch 2.13 renames both and warns of the old names at every call.
    getattr(distributed, "all_gather_single", distributed.all_gather_into_tensor)(*args, **kwargs)


def _reduce_scatter_into(*args: Any, **kwargs: Any) -> None:
    getattr(distributed, "reduce_scatter_single", distributed.reduce_scatter_tensor)(*args, **kwargs)


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: Tensor, ranks: ExpertGroup) -> Tensor:
        ctx.ranks = ranks
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        return ctx.ranks.all_reduce(gradients[0]), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: Tensor, ranks: ExpertGroup) -> Tensor:
        return ranks.all_reduce(tensor) if ranks.size > 1 else tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        return gradients[0], None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: Tensor, ranks: ExpertGroup) -> Tensor:
        ctx.ranks = ranks
        return ranks.all_gather(tensor) if ranks.size > 1 else tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        return ctx.ranks.reduce_scatter(gradients[0]), None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: Tensor, ranks: ExpertGroup) -> Tensor:
        ctx.ranks = ranks
        return ranks.reduce_scatter(tensor) if ranks.size > 1 else tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        return ctx.ranks.all_gather(gradients[0]), None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        tensor: Tensor,
        ranks: ExpertGroup,
        received: Sequence[int] | None,
        sent: Sequence[int] | None,
    ) -> Tensor:
        ctx.ranks, ctx.received, ctx.sent = ranks, received, sent
        return ranks.all_to_all(tensor, received, sent) if ranks.size > 1 else tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        return ctx.ranks.all_to_all(gradients[0], ctx.sent, ctx.received), None, None, None


class _GatherAssignments(torch.autograd.Function):
    """Gathers the weights and their experts' numbers in one collective, with their bytes side by side."""

    @staticmethod
    def forward(ctx, weights_TK: Tensor, experts_TK: Tensor, ranks: ExpertGroup):
        ctx.ranks = ranks
        columns = [_as_bytes(weights_TK), _as_bytes(experts_TK)]
        gathered = ranks.all_gather(torch.cat(columns, dim=1))
        weights, experts = gathered.split([column.shape[1] for column in columns], dim=1)
        weights_TK, experts_TK = (
            part.contiguous().view(like.dtype)
            for part, like in zip((weights, experts), (weights_TK, experts_TK), strict=True)
        )
        ctx.mark_non_differentiable(experts_TK)
        return weights_TK, experts_TK

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        return ctx.ranks.reduce_scatter(gradients[0]), None, None


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def copy_to_group(tensor: Tensor, ranks: ExpertGroup) -> Tensor:
    """Return a replicated tensor of which each rank uses its own part. Backward sums the ranks' gradients."""
    return _apply(_Copy, tensor, ranks)


def reduce_from_group(tensor: Tensor, ranks: ExpertGroup) -> Tensor:
    """Return the sum over the ranks. Backward hands the gradient of the sum to every rank unchanged."""
    return _apply(_Reduce, tensor, ranks)


def gather_from_group(tensor: Tensor, ranks: ExpertGroup) -> Tensor:
    """Gather each rank's [r, ...] to [size * r, ...]. Backward reduce-scatters the gradient."""
    return _apply(_Gather, tensor, ranks)


def reduce_scatter_to_group(tensor: Tensor, ranks: ExpertGroup) -> Tensor:
    """Sum [size * r, ...] over the ranks, and return this rank's [r, ...]. Backward gathers the gradient."""
    return _apply(_ReduceScatter, tensor, ranks)


def all_to_all(
    tensor: Tensor,
    ranks: ExpertGroup,
    received: Sequence[int] | None = None,
    sent: Sequence[int] | None = None,
) -> Tensor:
    """Do the same as `ExpertGroup.all_to_all`. Backward sends the gradient back the same way."""
    return _apply(_AllToAll, tensor, ranks, received, sent)


def gather_assignments(weights_TK: Tensor, experts_TK: Tensor, ranks: ExpertGroup) -> tuple[Tensor, Tensor]:
    """Gather [t, k] weights and the numbers of their experts (any integer type) to [size * t, k] each."""
    return _apply(_GatherAssignments, weights_TK, experts_TK, ranks)


def _apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    return function.apply(*args)
