"""NeMo on a CPU: what needs NeMo imported. Nothing acts on import, and nothing where CUDA is available.

What a run still has to say itself: `nl.Trainer(accelerator="cpu", devices=ranks)`; in the model's
configuration nothing that asks for Transformer Engine or Apex (`apply_rope_fusion`, `moe_grouped_gemm`,
`moe_permute_fusion` and `gradient_accumulation_fusion` off, the local layer spec), for sequence parallelism a
norm that supports it (`nemo_skymoe.moe.norm`), and for fp32 `bf16=False, params_dtype=torch.float32` where a
class defaults to bf16; with pipeline parallelism `pipeline_dtype=torch.float32` in the strategy.
"""

import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy
import torch

from . import cpu_runtime
from .targets import apply_rest, replace

_applied: list[str] = []


def apply() -> list[str]:
    """Substitute what Megatron-Core and NeMo (2.5 to 2.7) need of CUDA. It may be called again.

    Returns:
        The names of the substitutions in place, none if CUDA is available.
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
    return {f"nemo_cpu.{substitute.__name__}": substitute for substitute in SUBSTITUTIONS}


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

    replace(megatron_init, "_set_random_seed", set_random_seed)


def restored_tensors() -> None:
    """NeMo's lightning/io/pl.py asserts CUDA before it moves restored CUDA tensors, of which there are none here."""
    from nemo.lightning.io import pl

    def fix_tensors_device(ckpt: dict[str, Any]) -> dict[str, Any]:
        return ckpt

    replace(pl, "_fix_tensors_device", fix_tensors_device)


def local_checkpoints() -> None:
    """NeMo's nemo_logger.py asks of each checkpoint callback whether it is nvidia-resiliency-ext's, installed or not."""
    from nemo.lightning import nemo_logger

    if not nemo_logger.HAVE_RES:
        nemo_logger.lcp = SimpleNamespace(LocalCheckpointCallback=())


def mock_attention_mask() -> None:
    """NeMo's data/mock.py passes `create_attention_mask` where its dataset takes the seed, so that no batch has the
    mask which attention without Transformer Engine needs."""
    from nemo.collections.llm.gpt.data import mock

    class MockGPTDataset(mock._MockGPTDataset):
        def __init__(
            self, tokenizer: Any, name: str, num_samples: int, seq_length: int, masked: bool = False
        ):
            super().__init__(tokenizer, name, num_samples, seq_length, create_attention_mask=masked)

    replace(mock, "_MockGPTDataset", MockGPTDataset)


def progress_timers() -> None:
    """NeMo's progress_printer.py gathers Megatron's timers on rank 0 alone, by default none of them. NCCL drops the
    empty message, megatron-core 0.16 sends none; gloo counts it, pairs every later collective of the world with the
    wrong one, and all ranks wait for ever in the next (`ModelCheckpoint.file_exists` at the first save). Here rank 0
    prints its own times."""
    from nemo.lightning.pytorch.callbacks.progress_printer import ProgressPrinter

    def log_megatron_timers(self: ProgressPrinter, timers: Any) -> str | None:
        seconds = {name: timers(name).elapsed() / self.log_interval for name in timers._timers}
        return "".join(f"    {name}: {1000 * value:.2f} ms\n" for name, value in seconds.items()) or None

    replace(ProgressPrinter, "log_megatron_timers", log_megatron_timers)


def device_connections() -> None:
    """NeMo's megatron_comm_overlap.py asks the GPU's capability to advise on CUDA_DEVICE_MAX_CONNECTIONS."""
    from nemo.lightning.pytorch.callbacks.megatron_comm_overlap import MegatronCommOverlapCallback

    def check_nothing(self: MegatronCommOverlapCallback) -> None: ...

    replace(MegatronCommOverlapCallback, "_check_num_cuda_device_max_connections", check_nothing)


SUBSTITUTIONS = (
    random_seed,
    restored_tensors,
    local_checkpoints,
    mock_attention_mask,
    progress_timers,
    device_connections,
)
