"""Find the padding of a front door's batches. Neither NeMo nor Bridge tells its routers about it."""

import inspect
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.utils import get_batch_on_this_cp_rank
from torch import Tensor


def padding_of(batch: Any) -> Tensor | None:
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


def on_this_context_rank(mask: Tensor | None, device: torch.device) -> Tensor | None:
    """Return the positions of a [B, S] mask that this context-parallel rank has."""
    if mask is None:
        return None
    split: Any = get_batch_on_this_cp_rank
    known = inspect.signature(split).parameters
    # Newer versions split packed documents too, which these are not, and take the world for the group if told none.
    given = {"is_hybrid_cp": False, "cp_group": parallel_state.get_context_parallel_group()}
    return split({"mask": mask.to(device)}, **{name: given[name] for name in given if name in known})["mask"]
