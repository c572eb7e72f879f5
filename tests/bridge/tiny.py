"""A training of Bridge that takes a second: a tiny Skywork-MoE on random tokens, and the smallest configuration."""

from pathlib import Path
from typing import Any

import torch
from megatron.bridge.training.config import (
    CheckpointConfig,
    ConfigContainer,
    DistributedDataParallelConfig,
    DistributedInitConfig,
    LoggerConfig,
    MockGPTDatasetConfig,
    OptimizerConfig,
    RerunStateMachineConfig,
    RNGConfig,
    SchedulerConfig,
    TokenizerConfig,
    TrainingConfig,
    ValidationConfig,
)

from nemo_skymoe.architecture import Architecture
from nemo_skymoe.bridge.provider import SkyworkProvider, provider_of

SEQUENCE = 32
DENSE = Architecture(2, 32, 64, 4, vocab_size=128)
MOE = Architecture(2, 32, 64, 4, vocab_size=128, num_moe_experts=4)


def tiny_provider(architecture: Architecture = MOE, **options: Any) -> SkyworkProvider:
    """A provider that a CPU can train; `options` are fields of the provider."""
    defaults: dict[str, Any] = {
        "seq_length": SEQUENCE,
        "params_dtype": torch.float32,
        "pipeline_dtype": torch.float32,
        "bf16": False,
        "gradient_accumulation_fusion": False,
        # The coefficients move in every step, and away from both ends.
        "moe_adaptive_aux_loss_maximum": 0.5,
        "moe_adaptive_aux_loss_initial": 0.01,
        "moe_adaptive_aux_loss_smoothing": 0.5,
    }
    if architecture.num_moe_experts is not None:
        defaults["moe_expert_capacity_factor"] = 1.0
    return provider_of(architecture, **{**defaults, **options})


def tiny_config(
    folder: Path | str | None = None,
    steps: int = 4,
    model: SkyworkProvider | None = None,
    save_interval: int | None = None,
    global_batch_size: int = 4,
    micro_batch_size: int = 1,
    distributed_optimizer: bool = True,
    overrides: dict[str, dict[str, Any]] | None = None,
) -> ConfigContainer:
    """A whole configuration: `steps` optimizer steps, checkpoints in `folder` and from there, as Bridge resumes a run.

    Args:
        folder: Folder of the checkpoints; None saves and loads nothing.
        save_interval: Steps between two checkpoints; None saves at the last step.
        overrides: Values by section and option, such as `{"optimizer": {"lr": 0.1}}`.
    """
    config = ConfigContainer(
        model=model or tiny_provider(),
        train=TrainingConfig(
            train_iters=steps, global_batch_size=global_batch_size, micro_batch_size=micro_batch_size
        ),
        validation=ValidationConfig(eval_iters=0, eval_interval=None),
        optimizer=OptimizerConfig(
            optimizer="adam",
            lr=1e-2,
            min_lr=1e-3,
            weight_decay=0.01,
            clip_grad=1.0,
            bf16=False,
            use_distributed_optimizer=distributed_optimizer,
        ),
        scheduler=SchedulerConfig(
            lr_decay_style="constant",
            lr_warmup_iters=0,
            lr_decay_iters=100,
            max_steps=100,  # the same schedule however many steps a run has
            start_weight_decay=0.01,
            end_weight_decay=0.01,
            weight_decay_incr_style="constant",
        ),
        ddp=DistributedDataParallelConfig(use_distributed_optimizer=distributed_optimizer),
        dataset=MockGPTDatasetConfig(
            seq_length=SEQUENCE,
            random_seed=1,
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            num_workers=0,
            dataloader_type="single",
            skip_getting_attention_mask_from_dataset=False,
            create_attention_mask=True,
            persistent_workers=False,
        ),
        logger=LoggerConfig(log_interval=1, tensorboard_dir=None),
        tokenizer=TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=127),
        checkpoint=CheckpointConfig(
            save=None if folder is None else str(folder),
            load=None if folder is None else str(folder),
            save_interval=save_interval or steps,
            async_save=False,
            ckpt_format="torch_dist",
        ),
        rng=RNGConfig(seed=1),
        dist=DistributedInitConfig(distributed_backend="gloo"),
        rerun_state_machine=RerunStateMachineConfig(check_for_nan_in_loss=True),
    )
    for section, values in (overrides or {}).items():
        for name, value in values.items():
            target = getattr(config, section)
            assert hasattr(target, name), f"{section} has no {name}"
            setattr(target, name, value)
    return config
