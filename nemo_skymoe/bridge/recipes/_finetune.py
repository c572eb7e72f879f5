"""The configuration of a finetuning: of every parameter, or of the adapters of LoRA."""

from pathlib import Path
from typing import Any

from megatron.bridge.data.builders import GPTSFTDatasetConfig
from megatron.bridge.peft.lora import LoRA
from megatron.bridge.recipes.utils.dataset_utils import default_squad_config
from megatron.bridge.training.config import ConfigContainer, TokenizerConfig

from nemo_skymoe.bridge.data import CorpusConfig, tokenizer_of
from nemo_skymoe.bridge.recipes import _parts
from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.experiments import choices
from nemo_skymoe.experiments.catalogue import Chosen

DATA_SEED = 1234
"""Seed of the order of the samples. It is NeMo's; Bridge has another one for SQuAD."""
ADAPTED = ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]
"""The layers that get adapters: attention and MLPs, and not the router."""


def finetuning(chosen: Chosen) -> ConfigContainer:
    """Make the configuration.

    Raises:
        ConfigurationError: A value makes no sense. The message names it.
    """
    run: Any = chosen.run
    given: Any = chosen.given
    if given.resume_path is None:
        raise ConfigurationError(
            f"resume_path is missing, expected the checkpoint that {run.name} finetunes: resume_path=FOLDER"
        )
    usual = choices.LORA_LR if chosen.lora else choices.FINETUNE_LR
    adapters = LoRA(target_modules=ADAPTED, dim=choices.LORA_DIM, alpha=choices.LORA_ALPHA)
    return _parts.container(
        run,
        given.dir,
        given.resume_path,
        model=_parts.model(run, **(_without_balance(run) if chosen.lora else {})),
        optimizer=_parts.adam(given.max_lr or usual, 0.0),
        scheduler=_parts.schedule(run, "cosine"),
        peft=adapters if chosen.lora else None,
        **_data(chosen),
    )


def _without_balance(run: Any) -> dict[str, Any]:
    """Return the options of a model whose routers are frozen: nothing to balance, and no tokens to drop.

    There is one adapter for every expert, where grouped experts would share one.
    """
    if run.architecture.num_moe_experts is None:
        return {}
    return {
        "moe_router_load_balancing_type": "none",
        "moe_adaptive_aux_loss": False,
        "moe_expert_capacity_factor": None,
        "moe_grouped_gemm": False,
    }


def _data(chosen: Chosen) -> dict[str, Any]:
    size = chosen.run.seq_length
    if chosen.corpus is not None:
        dataset: Any = CorpusConfig(corpus=chosen.corpus, seq_length=size)
        return {"dataset": dataset, "tokenizer": tokenizer_of(Path(chosen.corpus))}
    if chosen.dataset is None:
        dataset = default_squad_config(size, enable_offline_packing=False)
    else:
        dataset = GPTSFTDatasetConfig(seq_length=size, dataset_root=chosen.dataset)
    dataset.seed = DATA_SEED
    tokenizer: Any = chosen.tokenizer or chosen.given.resume_path
    return {
        "dataset": dataset,
        "tokenizer": TokenizerConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=tokenizer),
    }
