"""Memory that is kept for the next tensor belongs to one process."""

import os

import torch

from nemo_skymoe.checkpoint.tensors.buffers import empty


def taken(value: int) -> list[torch.Tensor]:
    """All memory that is kept for tensors of this size, and what it held before it was filled."""
    tensors = [empty((1 << 20,), "float32") for _ in range(8)]
    held = [tensor.clone() for tensor in tensors]
    for tensor in tensors:
        tensor.fill_(value)
    return held


def test_processes_do_not_share_what_was_kept_before_they_were_forked():
    """Two writers that filled the same memory would write each other's tensors."""
    taken(1)
    child = os.fork()
    if child == 0:
        same = all((held == 1).all() for held in taken(2))
        os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0, "memory was not kept"
    assert all((held == 1).all() for held in taken(3))
