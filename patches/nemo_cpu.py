"""NeMo on a CPU: what needs NeMo imported. Nothing acts on import, and nothing where CUDA is available."""

import random
from types import SimpleNamespace
from typing import Any

import numpy
import torch

from . import cpu_runtime

_applied: list[str] = []


def apply() -> list[str]:
    """Substitute what Megatron-Core and NeMo need of CUDA; harmless to call again.

    Returns:
        The names of the substitutions in place: none where CUDA is available.
    """
    if torch.cuda.is_available():
        return []
    cpu_runtime.apply()
    if not _applied:
        for substitution in SUBSTITUTIONS:
            substitution()
            _applied.append(f"nemo_cpu.{substitution.__name__}")
    return applied()


def applied() -> list[str]:
    """Names of the substitutions in place in this process, those of Megatron-Core included."""
    return cpu_runtime.applied() + _applied


def random_seed() -> None:
    """NeMo's lightning/megatron_init.py seeds Megatron's RNG tracker only where a GPU is counted."""
    from megatron.core import parallel_state, tensor_parallel
    from nemo.lightning import megatron_init

    def set_random_seed(seed_: int) -> None:
        if not seed_ or seed_ < 0:
            raise ValueError(f"Seed ({seed_}) should be a positive integer.")
        seed = seed_ + 100 * parallel_state.get_pipeline_model_parallel_rank()
        random.seed(seed)
        numpy.random.seed(seed)
        torch.manual_seed(seed)
        tensor_parallel.model_parallel_cuda_manual_seed(seed)

    megatron_init._set_random_seed = set_random_seed


def restored_tensors() -> None:
    """NeMo's lightning/io/pl.py asserts CUDA before it moves restored CUDA tensors, of which there are none here."""
    from nemo.lightning.io import pl

    def fix_tensors_device(ckpt: dict[str, Any]) -> dict[str, Any]:
        return ckpt

    pl._fix_tensors_device = fix_tensors_device


def local_checkpoints() -> None:
    """NeMo's nemo_logger.py asks of each checkpoint callback whether it is nvidia-resiliency-ext's, installed or not."""
    from nemo.lightning import nemo_logger

    if not nemo_logger.HAVE_RES:
        nemo_logger.lcp = SimpleNamespace(LocalCheckpointCallback=())


SUBSTITUTIONS = (random_seed, restored_tensors, local_checkpoints)
