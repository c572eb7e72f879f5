"""Megatron-Core on a CPU over gloo. Nothing acts on import, and nothing where CUDA is available."""

import torch

_applied: list[str] = []


def apply() -> list[str]:
    """Substitute what Megatron-Core (0.14 to 0.16) needs of CUDA; harmless to call again.

    Returns:
        The names of the substitutions in place: none where CUDA is available.
    """
    if torch.cuda.is_available():
        return []
    if not _applied:
        from . import cpu_cuda, cpu_megatron, cpu_tensors

        for module in (cpu_tensors, cpu_cuda, cpu_megatron):
            for substitution in module.SUBSTITUTIONS:
                substitution()
                _applied.append(f"{module.__name__.rpartition('.')[2]}.{substitution.__name__}")
    return applied()


def applied() -> list[str]:
    """Names of the substitutions in place in this process."""
    return list(_applied)
