"""A world of ranks for one check, what its layers are made of, and how long a pass takes."""

import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from torch import Tensor, distributed, nn

from nemo_skymoe import gpus
from nemo_skymoe.patches import cpu_runtime, router_without_te

EXPERTS, TOPK = 16, 2


@contextmanager
def world() -> Iterator[None]:
    """Create Megatron's groups on this rank, whose tensor- and expert-parallel group are all ranks (EDP)."""
    cpu_runtime.apply()
    router_without_te.apply()
    torch.backends.cuda.matmul.allow_tf32 = False
    distributed.init_process_group(gpus.backend())
    ranks = distributed.get_world_size()
    parallel_state.initialize_model_parallel(
        ranks, expert_model_parallel_size=ranks, expert_tensor_parallel_size=1
    )
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
        distributed.destroy_process_group()


def drawn(name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Tensor:
    """Return values that follow from a name alone, the same on every device and rank."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(gpus.device())


def fill(module: nn.Module, rename: Callable[[str], str] = str) -> None:
    """Give every parameter values that follow from its name: norms are 1, matrices are small."""
    for name, parameter in module.named_parameters():
        values = (
            torch.ones_like(parameter)
            if parameter.dim() == 1
            else drawn(rename(name), (*parameter.shape,)) * 0.1
        )
        parameter.data.copy_(values)


def relative(found: Tensor, expected: Tensor) -> float:
    """Return |found - expected| / |expected| (Frobenius norms)."""
    size = float(expected.double().norm())
    return float((found.double() - expected.double()).norm()) / size if size else float(found.double().norm())


def microseconds(run: Callable[[], Any], repeats: int = 20) -> float:
    """Return the fastest of several runs, each to the end of what it started on the device."""
    fastest = float("inf")
    for number in range(repeats + 3):
        _finish()
        begin = time.perf_counter()
        run()
        _finish()
        if number >= 3:  # the first ones compile and allocate
            fastest = min(fastest, time.perf_counter() - begin)
    return fastest * 1e6


def _finish() -> None:
    if gpus.in_use():
        torch.cuda.synchronize()
