"""Replace what Megatron-Core itself takes for granted and a CPU does not have."""

import logging
import multiprocessing
import os
import threading
from multiprocessing.connection import wait
from multiprocessing.managers import SyncManager
from typing import Any

import torch
from megatron.core import optimizer
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.optimizer import distrib_optimizer
from megatron.core.pipeline_parallel import p2p_communication
from megatron.core.tensor_parallel import random
from megatron.core.transformer.moe import moe_utils, token_dispatcher

from . import cpu_cuda
from .cpu_adam import FusedAdam
from .targets import replace


def rng_tracker() -> None:
    """tensor_parallel/random.py sets generator states behind `_lazy_call`, which waits for CUDA for ever."""
    replace(random, "_get_cuda_rng_state", cpu_cuda.get_rng_state)
    replace(random, "_set_cuda_rng_state", cpu_cuda.set_rng_state)
    # It also warns whenever a fork of the CUDA generator moves the CPU's: here they are one.
    logging.getLogger(random.__name__).addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )


def router_gemm() -> None:
    """moe_utils.py reads `te_general_gemm` whether or not Transformer Engine was there to import it from (to 0.16)."""
    if not hasattr(moe_utils, "te_general_gemm"):
        setattr(moe_utils, "te_general_gemm", None)  # noqa: B010


def split_sizes() -> None:
    """token_dispatcher.py makes numpy arrays of split sizes on their way from the GPU: here they would stay tensors,
    which all_to_all_single refuses."""
    replace(token_dispatcher, "maybe_move_tensor_to_cpu", _on_the_host)


def _on_the_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def compilation() -> None:
    """jit.py compiles its fused functions with Inductor, which on a CPU needs a C++ compiler at run time."""
    torch._dynamo.config.disable = True  # pyright: ignore


def fused_adam() -> None:
    """torch's AdamW, which optimizer/__init__.py falls back to, breaks distributed-optimizer checkpoints: see cpu_adam."""
    if not distrib_optimizer.HAVE_APEX_OR_TE:
        replace(distrib_optimizer, "HAVE_APEX_OR_TE", True)
        replace(distrib_optimizer, "USING_APEX_OPTIMIZER", True)
        replace(distrib_optimizer, "Adam", FusedAdam)
        replace(optimizer, "Adam", FusedAdam)
        if hasattr(optimizer, "USING_PYTORCH_OPTIMIZER"):  # 0.14 asks the class alone
            replace(optimizer, "USING_PYTORCH_OPTIMIZER", False)


def restored_master_parameters() -> None:
    """distrib_optimizer.py loads its default format ("dp_reshardable") with gradients on, which fails where master
    parameters are views of fp32 model parameters: on a GPU they are mostly copies of bf16 ones."""
    optimizer_class = distrib_optimizer.DistributedOptimizer
    load = optimizer_class._set_main_param_and_optimizer_states
    replace(optimizer_class, "_set_main_param_and_optimizer_states", torch.no_grad()(load))


def batched_p2p() -> None:
    """p2p_communication.py pairs the messages of a batch by their order alone: two stages that are each other's
    neighbour on both sides (PP 2 with virtual stages) take activations for gradients, silently."""
    replace(p2p_communication, "_batched_p2p_ops", _ordered_p2p_ops)


def _ordered_p2p_ops(**messages: Any) -> list[torch.distributed.Work]:
    return list(p2p_communication._p2p_ops(**messages).values())


def results_queue() -> None:
    """filesystem_async.py spawns a manager process, as CUDA demands: 2 seconds and the whole main script run again
    in each rank, and a process left behind where a rank dies. A fork has none of these."""
    replace(filesystem_async, ("get_write_results_queue", "_get_write_results_queue"), _forked_results_queue)


_results_queues: dict[int, Any] = {}


def _forked_results_queue(mp_mode: str = "fork") -> Any:
    # Each process has its own: a rank that is forked from one that has saved already must not share its queue.
    process = os.getpid()
    if process not in _results_queues:
        manager = SyncManager(ctx=multiprocessing.get_context("fork"))
        manager.start(_end_with_the_parent)
        _results_queues[process] = manager.Queue()
    return _results_queues[process]


def _end_with_the_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()


SUBSTITUTIONS = (
    rng_tracker,
    router_gemm,
    split_sizes,
    compilation,
    fused_adam,
    restored_master_parameters,
    batched_p2p,
    results_queue,
)
