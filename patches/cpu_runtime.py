"""Megatron-Core on a CPU over gloo. Nothing acts on import, and nothing acts if CUDA is available."""

from collections.abc import Callable

import torch

from .targets import apply_rest

_applied: list[str] = []


def apply() -> list[str]:
    """Substitute what Megatron-Core (0.14 to 0.19) needs of CUDA. It may be called again.

    The substitutions hold in this process, in all its threads, and in processes that are forked from it.

    Returns:
        The names of the substitutions in place, none if CUDA is available.
    """
    if torch.cuda.is_available():
        return []
    apply_rest(substitutions(), _applied)
    return applied()


def applied() -> list[str]:
    """Return the names of the substitutions in place in this process."""
    return list(_applied)


def substitutions() -> dict[str, Callable[[], None]]:
    """Return every substitution by name. Its docstring says what upstream assumes, and where."""
    from . import cpu_cuda, cpu_megatron, cpu_tensors

    return {
        f"{module.__name__.rpartition('.')[2]}.{substitute.__name__}": substitute
        for module in (cpu_tensors, cpu_cuda, cpu_megatron)
        for substitute in module.SUBSTITUTIONS
    }
