"""Find the padding of NeMo's batches. NeMo itself tells no router about it."""
# No `from __future__ import annotations`: NeMo-Run reads these signatures.

from collections.abc import Iterator
from typing import Any, Optional

import torch
from megatron.core.utils import get_batch_on_this_cp_rank
from torch import Tensor


class Remembering:
    """A dataloader's iterator that keeps its last batch. A data step hands on only what its stage needs."""

    def __init__(self, batches: Iterator[Any]) -> None:
        self._batches = batches
        self.last: Any = None

    def __iter__(self) -> "Remembering":
        return self

    def __next__(self) -> Any:
        batch = next(self._batches)
        self.last = batch[0] if isinstance(batch, tuple) else batch
        return batch


def padding_of(batch: Any) -> Optional[Tensor]:
    """Return the padding of a batch, [B, S] booleans that are true for padding; None without, or if it cannot be known.

    A batch with `padding_mask` says it itself (true for padding, as in Megatron-Core). Otherwise the positions after
    the last one of each sequence that has a loss, by `loss_mask`, are padding. All positions before it are context,
    whether they have a loss or not.
    """
    if not isinstance(batch, dict):
        return None
    mask: Any = batch.get("padding_mask")
    if mask is None:
        loss_mask: Any = batch.get("loss_mask")
        if loss_mask is None:
            return None
        mask = (loss_mask > 0).flip(-1).cumsum(-1).flip(-1) == 0
    mask = mask.bool()
    # On a GPU the question whether there is any padding would have to wait for the answer.
    return None if mask.is_cpu and not mask.any() else mask


def on_this_context_rank(mask: Optional[Tensor], device: torch.device) -> Optional[Tensor]:
    """Return the positions of a [B, S] mask that this context-parallel rank has."""
    return None if mask is None else get_batch_on_this_cp_rank({"mask": mask.to(device)})["mask"]
