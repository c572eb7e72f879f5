"""What the recipes share: trainer, data, optimizer, logger and resumption as NeMo-Run configurations."""

import math
from typing import Any, Optional

import lightning.pytorch as pl
import nemo_run as run
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from nemo import lightning as nl
from nemo.collections.common.tokenizers.null_tokenizer import NullTokenizer
from nemo.collections.llm import MockDataModule
from nemo.collections.llm.recipes.precision.mixed_precision import bf16_mixed
from nemo.lightning.pytorch.callbacks import GarbageCollectionCallback, PreemptionCallback
from nemo.lightning.pytorch.callbacks.megatron_comm_overlap import MegatronCommOverlapCallback

from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.nemo.callbacks import SkyworkMoECallback
from nemo_skymoe.nemo.learning_rate import LearningRateSchedule, is_expert_parameter
from nemo_skymoe.nemo.mixture import mixture_data
from nemo_skymoe.nemo.model import skywork_local_layer_spec
from nemo_skymoe.recipes import _ours


def steps(tokens: float, seq_length: int, global_batch_size: int) -> int:
    """Optimizer steps that see at least `tokens` tokens.

    Raises:
        ConfigurationError: A number that is not above 0, by its name.
    """
    for name, value in (
        ("tokens", tokens),
        ("seq_length", seq_length),
        ("global_batch_size", global_batch_size),
    ):
        if not 0 < value < math.inf:
            raise ConfigurationError(f"{name} is {value}, expected a finite number above 0")
    return -(-round(tokens) // (seq_length * global_batch_size))


def trainer(
    max_steps: int,
    num_nodes: int,
    num_gpus_per_node: int,
    edp: int = 1,
    pipeline_parallelism: int = 1,
    callbacks: Optional[list[run.Config[pl.Callback]]] = None,
    val_check_interval: int = 1000,
    limit_val_batches: int = 32,
    log_every_n_steps: int = 10,
    communication_overlap: bool = True,
    tensor_parallel_overlap: bool = False,
    grad_reduce_in_fp32: bool = True,
) -> run.Config[nl.Trainer]:
    """bf16 with the distributed optimizer; `edp` ranks share the attention (TP, sequence-parallel) and the experts.

    `communication_overlap` hides the distributed optimizer's messages, and pipeline messages between virtual
    stages, behind computation: NeMo's callback decides which; those of tensor parallelism only if asked for, for
    they need Transformer Engine's user buffers. `grad_reduce_in_fp32=False` halves the gradients' messages.
    """
    strategy = run.Config(
        nl.MegatronStrategy,
        tensor_model_parallel_size=edp,
        expert_model_parallel_size=edp,
        expert_tensor_parallel_size=1,
        sequence_parallel=edp > 1,
        pipeline_model_parallel_size=pipeline_parallelism,
        pipeline_dtype=torch.bfloat16,
        gradient_as_bucket_view=True,
        ckpt_async_save=True,
        ckpt_parallel_load=True,
        ddp=run.Config(
            DistributedDataParallelConfig,
            use_distributed_optimizer=True,
            check_for_nan_in_grad=True,
            grad_reduce_in_fp32=grad_reduce_in_fp32,
        ),
    )
    precision = bf16_mixed()
    precision.grad_reduce_in_fp32 = grad_reduce_in_fp32
    shared = [
        run.Config(GarbageCollectionCallback, gc_interval_train=100, gc_interval_val=100),
        run.Config(PreemptionCallback),
    ]
    if communication_overlap:
        shared.append(run.Config(MegatronCommOverlapCallback, tp_comm_overlap=tensor_parallel_overlap))
    return run.Config(
        nl.Trainer,
        accelerator="auto",
        devices=num_gpus_per_node,
        num_nodes=num_nodes,
        max_steps=max_steps,
        limit_val_batches=limit_val_batches,
        val_check_interval=val_check_interval,
        log_every_n_steps=log_every_n_steps,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        plugins=precision,
        callbacks=(callbacks or []) + shared,
        strategy=strategy,
    )


def small_trainer(
    max_steps: int,
    devices: int = 1,
    tensor_parallelism: int = 1,
    expert_parallelism: int = 1,
    sequence_parallelism: bool = False,
    val_check_interval: int = 100,
    limit_val_batches: int = 8,
    log_every_n_steps: int = 5,
    callbacks: Optional[list[run.Config[pl.Callback]]] = None,
) -> run.Config[nl.Trainer]:
    """One machine, float32: GPUs where there are any, else CPU ranks over gloo."""
    strategy = run.Config(
        nl.MegatronStrategy,
        tensor_model_parallel_size=tensor_parallelism,
        expert_model_parallel_size=expert_parallelism,
        expert_tensor_parallel_size=1,
        sequence_parallel=sequence_parallelism,
        pipeline_dtype=torch.float32,
        gradient_as_bucket_view=True,
        ckpt_async_save=False,
        ckpt_parallel_load=False,
        ddp=run.Config(DistributedDataParallelConfig, use_distributed_optimizer=True),
    )
    return run.Config(
        nl.Trainer,
        accelerator="auto",
        devices=devices,
        num_nodes=1,
        max_steps=max_steps,
        limit_val_batches=limit_val_batches,
        val_check_interval=val_check_interval,
        log_every_n_steps=log_every_n_steps,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        plugins=run.Config(nl.MegatronMixedPrecision, precision="32", autocast_enabled=False),
        callbacks=[*(callbacks or []), run.Config(PreemptionCallback)],
        strategy=strategy,
    )


def moe_callbacks(similarity_interval: int) -> list[run.Config[pl.Callback]]:
    """What runs the adaptive coefficients and logs the router."""
    return [run.Config(SkyworkMoECallback, similarity_interval=similarity_interval)]


def data(
    corpus: Optional[str],
    seq_length: int,
    global_batch_size: int,
    micro_batch_size: int,
    vocab_size: int = _ours.VOCABULARY,
    seed: int = 1,
) -> Any:
    """The text in a folder of `skymoe corpus` or `skymoe preprocess`; None is NeMo's mock: random tokens, for dry runs."""
    sizes: dict[str, Any] = {
        "seq_length": seq_length,
        "global_batch_size": global_batch_size,
        "micro_batch_size": micro_batch_size,
    }
    if corpus is not None:
        return run.Config(mixture_data, corpus=corpus, seed=seed, **sizes)
    # The null tokenizer adds an end of document.
    tokenizer = run.Config(NullTokenizer, vocab_size=vocab_size - 1)
    return run.Config(MockDataModule, tokenizer=tokenizer, **sizes)


def logger(
    dir: Optional[str], name: str, save_every_n_steps: int, keep: int = 1
) -> run.Config[nl.NeMoLogger]:
    """TensorBoard and the last `keep` checkpoints (-1: all) under `dir/name`."""
    checkpoint = run.Config(
        nl.ModelCheckpoint,
        every_n_train_steps=save_every_n_steps,
        save_last=True,
        save_top_k=keep,
        monitor="step",
        mode="max",
        save_optim_on_train_end=True,
        filename="{step}",
    )
    return run.Config(
        nl.NeMoLogger,
        log_dir=dir,
        name=name,
        use_datetime_version=False,
        update_logger_directory=True,
        tensorboard=run.Config(TensorBoardLogger, save_dir="tensorboard", name=name),
        ckpt=checkpoint,
    )


def adam(
    max_lr: float,
    min_lr: float,
    warmup_steps: int,
    max_steps: int,
    shape: str = "cosine",
    decay_steps: int = 0,
    expert_lr_multiplier: float = 1.0,
) -> run.Config[nl.MegatronOptimizerModule]:
    """Megatron's Adam with decoupled weight decay; `max_lr` to `min_lr`, then in `decay_steps` steps to zero.

    The experts' parameters follow the same schedule with `expert_lr_multiplier` times the rate.

    Raises:
        ConfigurationError: A rate out of range, by its name.
    """
    if not 0 < max_lr < math.inf:
        raise ConfigurationError(f"max_lr is {max_lr}, expected a finite number above 0")
    if not 0 <= min_lr <= max_lr:
        raise ConfigurationError(f"min_lr is {min_lr}, expected 0 to max_lr = {max_lr}")
    if not 0 < expert_lr_multiplier < math.inf:
        raise ConfigurationError(
            f"expert_lr_multiplier is {expert_lr_multiplier}, expected a finite number above 0"
        )
    beta1, beta2 = _ours.ADAM_BETAS
    experts: dict[str, Any] = {"scale_lr_cond": is_expert_parameter, "lr_mult": expert_lr_multiplier}
    return run.Config(
        nl.MegatronOptimizerModule,
        config=run.Config(
            OptimizerConfig,
            optimizer="adam",
            lr=max_lr,
            min_lr=min_lr,
            weight_decay=_ours.WEIGHT_DECAY,
            adam_beta1=beta1,
            adam_beta2=beta2,
            adam_eps=_ours.ADAM_EPS,
            clip_grad=_ours.CLIP_GRAD,
            use_distributed_optimizer=True,
        ),
        lr_scheduler=run.Config(
            LearningRateSchedule,
            shape=shape,
            warmup_steps=warmup_steps,
            max_steps=max_steps,
            final_fraction=min_lr / max_lr,
            decay_steps=decay_steps,
        ),
        **(experts if expert_lr_multiplier != 1.0 else {}),
    )


def resume_from(checkpoint: Optional[str]) -> run.Config[nl.AutoResume]:
    """Resume the run's own last checkpoint if there is one, else start from `checkpoint`'s weights, else from scratch."""
    restore: Any = run.Config(nl.RestoreConfig, path=checkpoint) if checkpoint else None
    return run.Config(
        nl.AutoResume, restore_config=restore, resume_if_exists=True, resume_ignore_no_checkpoint=True
    )


def set_fusions(config: Any, transformer_engine: Optional[bool], **fusions: Optional[bool]) -> None:
    """Put a recipe's arguments on a model's configuration; None leaves what the machine that trains has.

    Without Transformer Engine's layers there are no grouped experts either, unless they are asked for.
    """
    if transformer_engine is False:
        config.transformer_layer_spec = skywork_local_layer_spec
        if fusions.get("moe_grouped_gemm") is None:
            fusions["moe_grouped_gemm"] = False
    for option, value in fusions.items():
        if value is not None:
            setattr(config, option, value)
