"""Compare two tensors, bit for bit."""

import torch
from torch import Tensor


def different(expected: Tensor, found: Tensor) -> str:
    """Return a sentence on how two tensors differ in any bit; empty where they do not. Equal NaNs are equal."""
    if expected.dtype != found.dtype or expected.shape != found.shape:
        return f"{list(found.shape)} of {found.dtype}, expected {list(expected.shape)} of {expected.dtype}"
    width = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[expected.itemsize]
    unequal = expected.contiguous().view(width) != found.contiguous().view(width)
    count = int(unequal.sum())
    if not count:
        return ""
    first = tuple(unequal.nonzero()[0].tolist())
    return (
        f"{count} of {expected.numel()} elements differ, the first at {list(first)}:"
        f" {found[first].item()}, expected {expected[first].item()}"
    )
