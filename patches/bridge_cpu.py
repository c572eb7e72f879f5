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
from .targets import MissingTarget, apply_rest, replace

_applied: list[str] = []


def apply() -> list[str]:
    """Substitute what Megatron-Core and Bridge (0.6) need of CUDA. It may be called again.

    Returns:
        The names of the substitutions in place, none if CUDA is available.

    Raises:
        MissingTarget: What a substitution replaces is not in this Bridge. The message names it.
    """
    if torch.cuda.is_available():
        return []
    cpu_runtime.apply()
    apply_rest(substitutions(), _applied)
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
        raise MissingTarget(
            f"{original.__module__}.initialize_megatron has no allow_no_cuda, which a patch sets"
        )

    def initialize_megatron(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **{"allow_no_cuda": True, **kwargs})

    replace(setup, "initialize_megatron", initialize_megatron)


def random_seed() -> None:
    """training/initialize.py seeds Megatron's RNG tracker only where it counts a GPU."""
    from megatron.bridge.training import initialize

    replace(initialize, "_set_random_seed", _set_random_seed)


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


def async_worker() -> None:
    """dist_checkpointing/strategies/async_utils.py (megatron-core): the process that saves in the background runs the
    main script again, takes a device by the number of GPUs, which is 0, and ends; the ranks wait for it for ever."""
    from megatron.core.dist_checkpointing.strategies import async_utils

    caller: Any = async_utils.PersistentAsyncCaller
    loop, start = caller.async_loop, caller._get_process

    def async_loop(*args: Any, **kwargs: Any) -> None:
        setattr(torch.cuda, "device_count", lambda: 1)  # noqa: B010
        loop(*args, **kwargs)

    def _get_process(_: Any, rank: int, mp_mode: str = "fork", *args: Any, **kwargs: Any) -> Any:
        return start(rank, "fork", *args, **kwargs)

    replace(caller, "async_loop", staticmethod(async_loop))
    replace(caller, "_get_process", classmethod(_get_process))


SUBSTITUTIONS = (initialization, random_seed, async_worker)
