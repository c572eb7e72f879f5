"""Parts that recipes share: model, data, optimizer, logger and resumption as NeMo-Run configurations."""

from typing import Any, Optional

import nemo_run as run
from lightning.pytorch.loggers import TensorBoardLogger
from megatron.core.optimizer import OptimizerConfig
from nemo import lightning as nl
from nemo.collections.common.tokenizers.null_tokenizer import NullTokenizer
from nemo.collections.llm import MockDataModule

from nemo_skymoe.experiments import choices
from nemo_skymoe.experiments.rates import check_rates
from nemo_skymoe.nemo.learning_rate import LearningRateSchedule, is_expert_parameter
from nemo_skymoe.nemo.mixture import mixture_data
from nemo_skymoe.nemo.model import SkyworkModel, SkyworkMoEModel, skywork_local_layer_spec


def dense_model(config: type[Any], **options: Any) -> Any:
    """Configure a dense model of a configuration class with these options."""
    return run.Config(SkyworkModel, config=run.Config(config, **options))


def moe_model(config: type[Any], expert_capacity_factor: Optional[float], **options: Any) -> Any:
    """Configure an MoE of a configuration class with these options."""
    made = run.Config(config, moe_expert_capacity_factor=expert_capacity_factor, **options)
    return run.Config(SkyworkMoEModel, config=made)


def data(
    corpus: Optional[str],
    *,
    seq_length: int,
    global_batch_size: int,
    micro_batch_size: int,
    vocab_size: int = choices.VOCABULARY,
    seed: int = 1,
) -> Any:
    """Configure the text in a folder of `skymoe corpus` or `skymoe preprocess`; None is NeMo's random tokens."""
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
    dir: Optional[str], name: str, *, save_every_n_steps: int, keep: int = 1
) -> run.Config[nl.NeMoLogger]:
    """Configure TensorBoard and the last `keep` checkpoints (-1 for all) under `dir/name`."""
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
    *,
    max_lr: float,
    min_lr: float,
    warmup_steps: int,
    max_steps: int,
    shape: str = "cosine",
    decay_steps: int = 0,
    expert_lr_multiplier: float = 1.0,
) -> run.Config[nl.MegatronOptimizerModule]:
    """Configure Megatron's Adam with decoupled weight decay, from `max_lr` to `min_lr`, then in `decay_steps` to zero.

    The experts' parameters follow the same schedule with `expert_lr_multiplier` times the rate.

    Raises:
        ConfigurationError: A rate is out of range. The message names it.
    """
    check_rates(max_lr, min_lr, expert_lr_multiplier)
    experts: dict[str, Any] = {"scale_lr_cond": is_expert_parameter, "lr_mult": expert_lr_multiplier}
    return run.Config(
        nl.MegatronOptimizerModule,
        config=run.Config(OptimizerConfig, **choices.adam(max_lr, min_lr)),
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
    """Resume the run's own last checkpoint, or start from the weights of `checkpoint`, or from scratch."""
    restore: Any = run.Config(nl.RestoreConfig, path=checkpoint) if checkpoint else None
    return run.Config(
        nl.AutoResume, restore_config=restore, resume_if_exists=True, resume_ignore_no_checkpoint=True
    )


def with_fusions(model: Any, transformer_engine: Optional[bool], **fusions: Optional[bool]) -> Any:
    """Put a recipe's fusion arguments on the configuration of `model`. None leaves what the training machine has.

    Without Transformer Engine's layers there are no grouped experts either, unless they are asked for.
    """
    if transformer_engine is False:
        model.config.transformer_layer_spec = skywork_local_layer_spec
        if fusions.get("moe_grouped_gemm") is None:
            fusions["moe_grouped_gemm"] = False
    for option, value in fusions.items():
        if value is not None:
            setattr(model.config, option, value)
    return model
