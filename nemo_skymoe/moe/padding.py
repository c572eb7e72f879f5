"""Padding: positions that fill up the sequences of a micro-batch, and that routers do not count.

From 0.16 on, Megatron passes a `padding_mask` to its routers. `padding_told` does so in every other case, such as NeMo.
Shape suffixes: B sequences, S positions, T tokens of this rank.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup


class ValidTokens:
    """The tokens of one rank's micro-batch that are not padding, called valid tokens.

    Attributes:
        mask_T1: True for every valid token.
        count: Number of valid tokens on this rank, a 0-dimensional int64 tensor.
        group_count: Number of valid tokens over the ranks that share the micro-batch, at least 1.
    """

    def __init__(self, mask_T1: Tensor, group: ProcessGroup) -> None:
        self.mask_T1 = mask_T1
        self.count = mask_T1.sum()
        self.group_count = sum_over(self.count, group).clamp_min(1)


def sum_over(count: Tensor, group: ProcessGroup) -> Tensor:
    """Return the sum of `count` over the ranks of `group` as a new tensor."""
    total = count.clone()
    if group.size() > 1:
        torch.distributed.all_reduce(total, group=group)
    return total


class ToldPadding:
    """The padding masks that one router was told and still needs.

    A recomputed layer routes a micro-batch twice: in the forward pass, without gradients, and again in the backward
    pass. By then the router may have been told about other micro-batches. Megatron's schedules run the backward passes
    of a model chunk in the order of its forward passes, so a queue keeps the masks.
    """

    def __init__(self) -> None:
        self._telling = False
        self._mask_BS: Tensor | None = None
        self._waiting: deque[Tensor | None] = deque()

    def begin(self, mask_BS: Tensor | None) -> None:
        """Begin the forward pass of a micro-batch with this mask."""
        self._telling, self._mask_BS = True, mask_BS

    def end(self) -> None:
        """End the forward pass."""
        self._telling, self._mask_BS = False, None

    def forget(self) -> None:
        """Forget all masks: the optimizer has stepped, so no backward pass is left."""
        self._waiting.clear()

    def of_this_pass(self) -> Tensor | None:
        """Return the mask [B, S] of the micro-batch that a router sees now in training; None without padding."""
        if self._telling:
            if not torch.is_grad_enabled():
                self._waiting.append(self._mask_BS)
            return self._mask_BS
        return self._waiting.popleft() if self._waiting and torch.is_grad_enabled() else None


@contextmanager
def padding_told(routers: Iterable[Any], padding_mask: Tensor | None) -> Iterator[None]:
    """Tell routers which tokens of a micro-batch are padding, during the forward pass inside the `with` block.

    Use it for every micro-batch or for none.

    Args:
        routers: The `SkyworkRouter` objects of the model chunk whose forward pass runs inside, from `find_routers`.
        padding_mask: [B, S], True for padding, or None without padding. It has the positions of this context-parallel
            rank, of which a sequence-parallel rank takes its own part.
    """
    routers = list(routers)
    for router in routers:
        router.told_padding.begin(padding_mask)
    try:
        yield
    finally:
        for router in routers:
            router.told_padding.end()
