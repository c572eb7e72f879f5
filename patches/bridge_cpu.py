"""Megatron-Bridge on a CPU over gloo. Nothing acts on import, and nothing where CUDA is available.

Each substitution says what upstream assumes, and where. A run still has to say itself what a CPU needs: gloo, the layer
spec of Megatron's own modules, no fusions, fp32, and the attention mask from the dataset.
"""

import inspect
import random
from collections.abc import Callable
from typing import Any

import numpy
import torch

from . import cpu_runtime

_applied: list[str] = []


def apply() -> list[str]:
    """Substitute what Megatron-Core and Bridge (0.6) need of CUDA. It may be called again.

    Returns:
        The names of the substitutions in place, none if CUDA is available.

    Raises:
        RuntimeError: What a substitution replaces is not in this Bridge. The message names it.
    """
    if torch.cuda.is_available():
        return []
    cpu_runtime.apply()
    if not _applied:
        for name, substitute in substitutions().items():
            substitute()
            _applied.append(name)
    return applied()


def applied() -> list[str]:
    """Return the names of the substitutions in place in this process, with those of Megatron-Core."""
    return cpu_runtime.applied() + _applied


def substitutions() -> dict[str, Callable[[], None]]:
    """Return every substitution by name, without those of `cpu_runtime`."""
    return {f"bridge_cpu.{substitute.__name__}": substitute for substitute in SUBSTITUTIONS}


def initialization() -> None:
    """training/setup.py calls `initialize_megatron` without `allow_no_cuda`, and so asserts CUDA."""
    from megatron.bridge.training import setup

    original = setup.initialize_megatron
    if "allow_no_cuda" not in inspect.signature(original).parameters:
        raise RuntimeError("initialize_megatron of megatron.bridge.training.setup has no allow_no_cuda")

    def initialize_megatron(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **{"allow_no_cuda": True, **kwargs})

    setup.initialize_megatron = initialize_megatron


def random_seed() -> None:
    """training/initialize.py seeds Megatron's RNG tracker only where it counts a GPU."""
    from megatron.bridge.training import initialize

    _present(initialize, "_set_random_seed")
    _present(initialize, "get_pg_rank")
    initialize._set_random_seed = _set_random_seed


def _set_random_seed(
    seed_: int, data_parallel_random_init: bool = False, *_: Any, pg_collection: Any, **__: Any
) -> None:
    from megatron.core import tensor_parallel
    from megatron.core.utils import get_pg_rank

    if not seed_ or seed_ < 0:
        raise ValueError(f"Seed ({seed_}) should be a positive integer.")
    seed = seed_ + 100 * get_pg_rank(pg_collection.pp)
    if data_parallel_random_init:
        seed += 10 * get_pg_rank(pg_collection.dp)
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(
        seed,
        tp_rank=get_pg_rank(pg_collection.tp),
        ep_rank=get_pg_rank(pg_collection.ep),
        etp_rank=get_pg_rank(pg_collection.expt_tp),
    )


def memory_report() -> None:
    """training/utils/train_utils.py reports the allocator of the GPU in the first line of the log."""
    from megatron.bridge.training.utils import train_utils

    _present(train_utils, "report_memory")

    def report_memory(*_: Any, **__: Any) -> dict[str, Any]:
        return {}

    train_utils.report_memory = report_memory


def _present(module: Any, name: str) -> None:
    if not hasattr(module, name):
        raise RuntimeError(f"{module.__name__} has no {name}, which the CPU runtime replaces")


SUBSTITUTIONS = (initialization, random_seed, memory_report)
