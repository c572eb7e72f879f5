"""What the recipes share: trainer, logger and learning-rate schedule as NeMo-Run configurations."""

from typing import Any, Optional

import lightning.pytorch as pl
import nemo_run as run
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from nemo import lightning as nl
from nemo.lightning.pytorch.optim import CosineAnnealingScheduler


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
        callbacks=callbacks or [],
        strategy=strategy,
    )


def logger(dir: Optional[str], name: str, save_every_n_steps: int) -> run.Config[nl.NeMoLogger]:
    """TensorBoard and checkpoints under `dir/name`."""
    checkpoint = run.Config(
        nl.ModelCheckpoint,
        every_n_train_steps=save_every_n_steps,
        save_last=True,
        save_top_k=1,
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


def adam_with_cosine(
    max_lr: float, min_lr: float, warmup_steps: int, max_steps: int
) -> run.Config[nl.MegatronOptimizerModule]:
    """Megatron's Adam with decoupled weight decay, and a cosine from `max_lr` to `min_lr`."""
    return run.Config(
        nl.MegatronOptimizerModule,
        config=run.Config(
            OptimizerConfig,
            optimizer="adam",
            lr=max_lr,
            min_lr=min_lr,
            weight_decay=0.1,
            adam_beta1=0.9,
            adam_beta2=0.95,
            adam_eps=1e-8,
            clip_grad=1.0,
            use_distributed_optimizer=True,
        ),
        lr_scheduler=run.Config(
            CosineAnnealingScheduler,
            max_steps=max_steps,
            warmup_steps=warmup_steps,
            constant_steps=0,
            min_lr=min_lr,
        ),
    )


def resume_from(checkpoint: Optional[str]) -> run.Config[nl.AutoResume]:
    """Resume the run's own last checkpoint if there is one, else start from `checkpoint`'s weights, else from scratch."""
    restore: Any = run.Config(nl.RestoreConfig, path=checkpoint) if checkpoint else None
    return run.Config(
        nl.AutoResume, restore_config=restore, resume_if_exists=True, resume_ignore_no_checkpoint=True
    )
