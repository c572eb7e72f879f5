"""Differentiable collectives over the ranks that share a layer's experts, each of which can be begun and ended apart.

Megatron's own collectives (tensor_parallel/mappings.py) return an unreduced tensor for a non-contiguous input up to
0.18, and their failures say neither which layer nor which group it was.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nemo_skymoe.moe.expert_group import Begun, ExpertGroup


class Exchange:
    """A collective that has begun, with the one that takes its gradient back.

    Its beginning and its end are two steps of the graph. In the backward pass the end begins the gradient's collective,
    and the beginning waits for it. What was computed between the two, and meanwhile, is computed meanwhile in both passes:
    autograd goes back through independent steps in the reverse of the order in which they were made.

    Args:
        tensor: What is sent.
        forward: Begins the collective.
        backward: Begins the gradient's.
    """

    def __init__(
        self, tensor: Tensor, forward: Callable[[Tensor], Begun], backward: Callable[[Tensor], Begun]
    ) -> None:
        self.forward = forward
        self.backward = backward
        self.begun: Begun | None = None
        self._result: Tensor | None = _apply(_Begin, tensor, self)

    def end(self) -> Tensor:
        """Wait for the result and return it."""
        result, self._result = self._result, None
        return _apply(_End, result, self)

    def wait(self) -> Tensor:
        """Wait for what was begun last."""
        assert self.begun is not None
        begun, self.begun = self.begun, None
        return begun.wait()


class _Begin(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        exchange.begun = exchange.forward(tensor)
        result = exchange.begun.result
        return result.view_as(result) if result is tensor else result

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        # The gradient that arrives is the one that `_End` has sent, handed through for its shape.
        return ctx.exchange.wait(), None


class _End(torch.autograd.Function):
    @staticmethod
    def forward(ctx, result: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        exchange.wait()
        return result.view_as(result)

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        ctx.exchange.begun = ctx.exchange.backward(gradients[0])
        return gradients[0], None


class _GatherAssignments(torch.autograd.Function):
    """Gathers the weights and their experts' numbers in one collective, with their bytes side by side."""

    @staticmethod
    def forward(ctx, weights_TK: Tensor, experts_TK: Tensor, ranks: ExpertGroup):
        ctx.ranks = ranks
        columns = [_as_bytes(weights_TK), _as_bytes(experts_TK)]
        gathered = ranks.all_gather(torch.cat(columns, dim=1))
        weights, experts = gathered.split([column.shape[1] for column in columns], dim=1)
        weights_TK, experts_TK = (
            # A piece of one row counts as contiguous, but may not be viewed.
            part.clone(memory_format=torch.contiguous_format).view(like.dtype)
            for part, like in zip((weights, experts), (weights_TK, experts_TK), strict=True)
        )
        ctx.mark_non_differentiable(experts_TK)
        return weights_TK, experts_TK

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        return ctx.ranks.reduce_scatter(gradients[0]), None, None


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def hold(tensor: Tensor) -> Exchange:
    """Exchange nothing: the tensor is its own result, in both passes."""
    return Exchange(tensor, Begun, Begun)


def begin_copy_to_group(tensor: Tensor, ranks: ExpertGroup) -> Exchange:
    """Begin what `copy_to_group` does, which in the forward pass is nothing."""
    return Exchange(tensor, Begun, ranks.begin_all_reduce)


def begin_reduce_from_group(tensor: Tensor, ranks: ExpertGroup) -> Exchange:
    """Begin what `reduce_from_group` does."""
    return Exchange(tensor, ranks.begin_all_reduce, Begun)


def begin_gather_from_group(tensor: Tensor, ranks: ExpertGroup) -> Exchange:
    """Begin what `gather_from_group` does."""
    return Exchange(tensor, ranks.begin_all_gather, ranks.begin_reduce_scatter)


def begin_reduce_scatter_to_group(tensor: Tensor, ranks: ExpertGroup) -> Exchange:
    """Begin what `reduce_scatter_to_group` does."""
    return Exchange(tensor, ranks.begin_reduce_scatter, ranks.begin_all_gather)


def begin_all_to_all(
    tensor: Tensor,
    ranks: ExpertGroup,
    received: Sequence[int] | None = None,
    sent: Sequence[int] | None = None,
) -> Exchange:
    """Begin what `all_to_all` does."""
    return Exchange(
        tensor,
        lambda rows: ranks.begin_all_to_all(rows, received, sent),
        lambda rows: ranks.begin_all_to_all(rows, sent, received),
    )


def copy_to_group(tensor: Tensor, ranks: ExpertGroup) -> Tensor:
    """Return a replicated tensor of which each rank uses its own part. Backward sums the ranks' gradients."""
    return begin_copy_to_group(tensor, ranks).end()


def reduce_from_group(tensor: Tensor, ranks: ExpertGroup) -> Tensor:
    """Return the sum over the ranks. Backward hands the gradient of the sum to every rank unchanged."""
    return begin_reduce_from_group(tensor, ranks).end()


def gather_from_group(tensor: Tensor, ranks: ExpertGroup) -> Tensor:
    """Gather each rank's [r, ...] to [size * r, ...]. Backward reduce-scatters the gradient."""
    return begin_gather_from_group(tensor, ranks).end()


def reduce_scatter_to_group(tensor: Tensor, ranks: ExpertGroup) -> Tensor:
    """Sum [size * r, ...] over the ranks, and return this rank's [r, ...]. Backward gathers the gradient."""
    return begin_reduce_scatter_to_group(tensor, ranks).end()


def all_to_all(
    tensor: Tensor,
    ranks: ExpertGroup,
    received: Sequence[int] | None = None,
    sent: Sequence[int] | None = None,
) -> Tensor:
    """Do the same as `ExpertGroup.all_to_all`. Backward sends the gradient back the same way."""
    return begin_all_to_all(tensor, ranks, received, sent).end()


def gather_assignments(weights_TK: Tensor, experts_TK: Tensor, ranks: ExpertGroup) -> tuple[Tensor, Tensor]:
    """Gather [t, k] weights and the numbers of their experts (any integer type) to [size * t, k] each."""
    return _apply(_GatherAssignments, weights_TK, experts_TK, ranks)


def _apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    return function.apply(*args)
