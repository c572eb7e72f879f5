"""Padding: positions of a micro-batch that fill its sequences up and count nowhere in a router.

Megatron passes a `padding_mask` to its routers from 0.16 on. Where nothing does, as in NeMo, `padding_told` tells
them. Shape suffixes: B sequences, S positions, T tokens of this rank.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup


class ValidTokens:
    """The tokens of one rank's micro-batch that are no padding.

    Attributes:
        mask_T1: True for every token that is no padding.
        count: Their number on this rank, a 0-dimensional int64 tensor.
        group_count: Their number over the ranks that share the micro-batch, at least 1.
    """

    def __init__(self, mask_T1: Tensor, group: ProcessGroup) -> None:
        self.mask_T1 = mask_T1
        self.count = mask_T1.sum()
        self.group_count = sum_over(self.count, group).clamp_min(1)


def sum_over(count: Tensor, group: ProcessGroup) -> Tensor:
    """A new tensor: the sum of `count` over the ranks of `group`."""
    total = count.clone()
    if group.size() > 1:
        torch.distributed.all_reduce(total, group=group)
    return total


class ToldPadding:
    """The padding masks that one router was told and still needs.

    A layer that is recomputed routes a micro-batch twice: in the forward pass without gradients, and again in the
    backward pass, when other micro-batches may have been told of. Megatron's schedules run the backward passes of
    a model chunk in the order of its forward passes, so the masks wait in a queue.
    """

    def __init__(self) -> None:
        self._telling = False
        self._mask_BS: Tensor | None = None
        self._waiting: deque[Tensor | None] = deque()

    def begin(self, mask_BS: Tensor | None) -> None:
        """A forward pass of this micro-batch begins."""
        self._telling, self._mask_BS = True, mask_BS

    def end(self) -> None:
        """The forward pass is over."""
        self._telling, self._mask_BS = False, None

    def forget(self) -> None:
        """An optimizer step is over: no backward pass is left to come."""
        self._waiting.clear()

    def of_this_pass(self) -> Tensor | None:
        """The mask [B, S] of the micro-batch that a router in training mode sees now; None without padding."""
        if self._telling:
            if not torch.is_grad_enabled():
                self._waiting.append(self._mask_BS)
            return self._mask_BS
        return self._waiting.popleft() if self._waiting and torch.is_grad_enabled() else None


@contextmanager
def padding_told(routers: Iterable[Any], padding_mask: Tensor | None) -> Iterator[None]:
    """Tell routers, for one forward pass of a micro-batch, which of its tokens are padding.

    To be used for every micro-batch or for none.

    Args:
        routers: The `SkyworkRouter`s of the model chunk whose forward pass runs inside, from `find_routers`.
        padding_mask: [B, S], True for padding, with the positions that this context-parallel rank has; None
            where there is no padding. A sequence-parallel rank takes its own part of it.
    """
    routers = list(routers)
    for router in routers:
        router.told_padding.begin(padding_mask)
    try:
        yield
    finally:
        for router in routers:
            router.told_padding.end()
