"""The parts of Bridge's configuration that all recipes have, from a training in plain values."""

from pathlib import Path
from typing import Any

import torch
from megatron.bridge.training.comm_overlap import CommOverlapConfig
from megatron.bridge.training.config import (
    CheckpointConfig,
    ConfigContainer,
    DistributedDataParallelConfig,
    DistributedInitConfig,
    GPTDatasetConfig,
    OptimizerConfig,
    RNGConfig,
    TokenizerConfig,
    TrainingConfig,
    ValidationConfig,
)
from megatron.bridge.training.mixed_precision import MixedPrecisionConfig

from nemo_skymoe import gpus
from nemo_skymoe.bridge.learning_rate import ExpertLearningRate
from nemo_skymoe.bridge.logger import SkyworkLoggerConfig
from nemo_skymoe.bridge.provider import SkyworkProvider, provider_of
from nemo_skymoe.bridge.schedule import SkyworkSchedulerConfig
from nemo_skymoe.experiments import choices
from nemo_skymoe.experiments.runs import Demonstration, Finetuning, Pretraining, PretrainingRun
from nemo_skymoe.moe.layer import have_transformer_engine

Training = Pretraining | Demonstration | Finetuning
INITIAL_SEED = 1234
"""Seed of the initial weights. It is NeMo's, which seeds all its trainings with it."""


def container(run: Training, dir: str | None, resume_path: str | None, **parts: Any) -> ConfigContainer:
    """Return the configuration of a training.

    Args:
        run: The sizes, and the name.
        dir: Folder of all runs. Checkpoints go to `dir/NAME`, the log for TensorBoard to `dir/tensorboard/NAME`.
        resume_path: A checkpoint with the weights to start from, if the run has no checkpoint of its own.
        parts: The parts that differ between pretraining and finetuning.
    """
    small, folder = run.precision == "32", Path(dir or "nemo_experiments")  # Bridge's own
    similarity: dict[str, Any] = {}
    if isinstance(run, PretrainingRun):
        similarity = {"similarity_interval": run.similarity_interval}
    return ConfigContainer(
        train=_train(run, small),
        validation=ValidationConfig(eval_interval=run.val_check_interval, eval_iters=run.limit_val_batches),
        ddp=_ddp(small),
        logger=SkyworkLoggerConfig(
            log_interval=run.log_interval,
            tensorboard_dir=str(folder / "tensorboard" / run.name),
            **similarity,
        ),
        checkpoint=_checkpoint(run, folder / run.name, resume_path, small),
        rng=RNGConfig(seed=INITIAL_SEED),
        dist=DistributedInitConfig(distributed_backend="nccl" if gpus.in_use() else "gloo"),
        mixed_precision=_float32() if small else "bf16_mixed",
        comm_overlap=None if small else CommOverlapConfig(tp_comm_overlap=False),
        **parts,
    )


def model(run: Training, **options: Any) -> SkyworkProvider:
    """Return the model with its parallel sizes. `options` are further fields of the provider."""
    of_checkpoint = dict(run.model_options)
    if of_checkpoint:  # Bridge adds no rows to those that are stored
        of_checkpoint |= {"unpadded_vocab_size": run.architecture.vocab_size, "should_pad_vocab": False}
    experts: dict[str, Any] = {}
    if run.architecture.num_moe_experts is not None:
        experts = {
            "moe_expert_capacity_factor": run.expert_capacity_factor,
            "moe_router_logit_norm_scale": run.logit_norm_scale,
            "expert_model_parallel_size": run.edp,
            "expert_tensor_parallel_size": 1,
        }
    sizes = {
        "seq_length": run.seq_length,
        "rotary_base": run.rotary_base,
        "train_only_ffn": run.train_only_ffn,
        "tensor_model_parallel_size": run.edp,
        "sequence_parallel": run.edp > 1,
        "pipeline_model_parallel_size": run.pipeline_parallelism,
        "pipeline_model_parallel_layout": run.pipeline_layout,
        "pipeline_dtype": torch.float32 if run.precision == "32" else torch.bfloat16,
    }
    return provider_of(run.architecture, **sizes | experts | of_checkpoint | options)


def adam(max_lr: float, min_lr: float) -> OptimizerConfig:
    """Return Megatron's Adam with decoupled weight decay and the distributed optimizer."""
    return OptimizerConfig(**choices.adam(max_lr, min_lr))


def schedule(run: Training, shape: str) -> SkyworkSchedulerConfig:
    """Return the learning rate from the peak along `shape`, and the weight decay, which Bridge has here."""
    return SkyworkSchedulerConfig(
        lr_decay_style=shape,  # type: ignore[arg-type]
        lr_warmup_iters=run.warmup_steps,
        lr_final_decay_iters=run.decay_steps,
        start_weight_decay=choices.WEIGHT_DECAY,
        end_weight_decay=choices.WEIGHT_DECAY,
        weight_decay_incr_style="constant",
    )


def expert_rate(multiplier: float) -> ExpertLearningRate:
    """Return the experts' learning rate, as a multiple of that of everything else."""
    return ExpertLearningRate(multiplier=multiplier)


def random_tokens(run: Training, seed: int) -> dict[str, Any]:
    """Return Bridge's random tokens, and a tokenizer with the model's vocabulary."""
    without_mask = have_transformer_engine()
    dataset = GPTDatasetConfig(
        seq_length=run.seq_length,
        random_seed=seed,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        blend=None,
        split="900,50,50",
        dataloader_type="single",
        num_workers=8,
        skip_getting_attention_mask_from_dataset=without_mask,
        create_attention_mask=not without_mask,
    )
    tokenizer = TokenizerConfig(
        tokenizer_type="NullTokenizer", vocab_size=run.architecture.vocab_size, use_tokenizer_vocab_size=True
    )
    return {"dataset": dataset, "tokenizer": tokenizer}


def _train(run: Training, small: bool) -> TrainingConfig:
    return TrainingConfig(
        train_iters=run.max_steps,
        global_batch_size=run.global_batch_size,
        micro_batch_size=run.micro_batch_size,
        exit_signal_handler=True,  # SLURM's SIGTERM: save and leave
        manual_gc=not small,
        manual_gc_interval=0 if small else 100,
        manual_gc_eval=not small,
    )


def _ddp(small: bool) -> DistributedDataParallelConfig:
    return DistributedDataParallelConfig(
        use_distributed_optimizer=True, check_for_nan_in_grad=not small, grad_reduce_in_fp32=True
    )


def _checkpoint(run: Training, folder: Path, resume_path: str | None, small: bool) -> CheckpointConfig:
    kept = getattr(run, "kept_checkpoints", 1)
    return CheckpointConfig(
        save=str(folder),
        load=str(folder),
        save_interval=run.save_interval,
        most_recent_k=kept,
        pretrained_checkpoint=resume_path,
        ckpt_format="torch_dist",
        async_save=not small,
        # The worker of nvidia-resiliency-ext takes a GPU before it saves, and ends without one: the ranks wait for ever.
        async_strategy="nvrx" if gpus.in_use() else "mcore",
        fully_parallel_save=True,
        fully_parallel_load=not small,
    )


def _float32() -> MixedPrecisionConfig:
    return MixedPrecisionConfig(
        fp32=True, params_dtype=torch.float32, pipeline_dtype=torch.float32, grad_reduce_in_fp32=True
    )
