"""NeMo's trainer of a run, on nodes of GPUs in bf16 or on one machine in float32."""

from collections.abc import Sequence
from typing import Any

import nemo_run as run
import torch
from megatron.core.distributed import DistributedDataParallelConfig
from nemo import lightning as nl
from nemo.collections.llm.recipes.precision.mixed_precision import bf16_mixed
from nemo.lightning.pytorch.callbacks import GarbageCollectionCallback, PreemptionCallback
from nemo.lightning.pytorch.callbacks.megatron_comm_overlap import MegatronCommOverlapCallback

from nemo_skymoe.experiments.runs import Demonstration, Finetuning, Pretraining

Training = Pretraining | Demonstration | Finetuning
"""A training that has a number of steps."""
Callbacks = Sequence[Any]
"""NeMo-Run configurations of Lightning's callbacks."""


def trainer_of(training: Training, callbacks: Callbacks = (), **overlap: bool) -> run.Config[nl.Trainer]:
    """Return the trainer for the precision of `training`. `overlap` are options of `cluster_trainer`."""
    if training.precision == "32":
        return small_trainer(training, callbacks)
    return cluster_trainer(training, callbacks, **overlap)


def cluster_trainer(
    training: Training,
    callbacks: Callbacks = (),
    *,
    communication_overlap: bool = True,
    tensor_parallel_overlap: bool = False,
    grad_reduce_in_fp32: bool = True,
) -> run.Config[nl.Trainer]:
    """Configure a trainer in bf16 with the distributed optimizer.

    Args:
        training: The sizes.
        callbacks: Callbacks before those that all trainings have.
        communication_overlap: Whether to hide the distributed optimizer's messages, and pipeline messages between
            virtual stages, behind computation. NeMo's callback decides which.
        tensor_parallel_overlap: Whether to hide the messages of tensor parallelism too, which needs Transformer
            Engine's user buffers.
        grad_reduce_in_fp32: False halves the gradients' messages.
    """
    ddp = run.Config(
        DistributedDataParallelConfig,
        use_distributed_optimizer=True,
        check_for_nan_in_grad=True,
        grad_reduce_in_fp32=grad_reduce_in_fp32,
    )
    strategy = _strategy(training, ddp, torch.bfloat16, save_in_background=True)
    strategy.pipeline_model_parallel_size = training.pipeline_parallelism
    precision = bf16_mixed()
    precision.grad_reduce_in_fp32 = grad_reduce_in_fp32
    shared: list[Any] = [
        run.Config(GarbageCollectionCallback, gc_interval_train=100, gc_interval_val=100),
        run.Config(PreemptionCallback),
    ]
    if communication_overlap:
        shared.append(run.Config(MegatronCommOverlapCallback, tp_comm_overlap=tensor_parallel_overlap))
    return _trainer(training, strategy, precision, [*callbacks, *shared])


def overlaps_communication(trainer: Any) -> bool:
    """Say whether a trainer hides the distributed optimizer's messages behind computation."""
    return any(callback.__fn_or_cls__ is MegatronCommOverlapCallback for callback in trainer.callbacks)


def small_trainer(training: Training, callbacks: Callbacks = ()) -> run.Config[nl.Trainer]:
    """Configure a trainer for one machine in float32, on GPUs if there are any, else on CPU ranks over gloo."""
    ddp = run.Config(DistributedDataParallelConfig, use_distributed_optimizer=True)
    strategy = _strategy(training, ddp, torch.float32, save_in_background=False)
    if training.pipeline_parallelism > 1:
        strategy.pipeline_model_parallel_size = training.pipeline_parallelism
    precision = run.Config(nl.MegatronMixedPrecision, precision="32", autocast_enabled=False)
    return _trainer(training, strategy, precision, [*callbacks, run.Config(PreemptionCallback)])


def _strategy(training: Training, ddp: Any, dtype: torch.dtype, *, save_in_background: bool) -> Any:
    dense = training.architecture.num_moe_experts is None
    return run.Config(
        nl.MegatronStrategy,
        tensor_model_parallel_size=training.edp,
        expert_model_parallel_size=1 if dense else training.edp,
        expert_tensor_parallel_size=1,
        sequence_parallel=training.edp > 1,
        pipeline_dtype=dtype,
        gradient_as_bucket_view=True,
        ckpt_async_save=save_in_background,
        ckpt_parallel_load=save_in_background,
        ddp=ddp,
    )


def _trainer(training: Training, strategy: Any, precision: Any, callbacks: list[Any]) -> Any:
    return run.Config(
        nl.Trainer,
        accelerator="auto",
        devices=training.num_gpus_per_node,
        num_nodes=training.num_nodes,
        max_steps=training.max_steps,
        limit_val_batches=training.limit_val_batches,
        val_check_interval=training.val_check_interval,
        log_every_n_steps=training.log_interval,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        plugins=precision,
        callbacks=callbacks,
        strategy=strategy,
    )
