"""Tiny models of the families people have, made and saved by transformers' own classes, with random norms and biases."""

from pathlib import Path
from typing import Any

import torch
from megatron.core.transformer import attention
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from tests.checkpoint.hf_models import SIZES

MEGATRON_HAS_YARN = hasattr(attention, "_yarn_get_concentration_factor_from_config")
"""Whether the installed Megatron-Core can compute it, as 0.14 cannot: tests/moe/test_rotary.py sees it refused."""
Made = tuple[Any, Any, dict[str, Any]]
"""The classes of the configuration and of the model, and what its configuration has beside SIZES."""
LLAMA, MISTRAL = (LlamaConfig, LlamaForCausalLM), (MistralConfig, MistralForCausalLM)
QWEN2, QWEN3 = (Qwen2Config, Qwen2ForCausalLM), (Qwen3Config, Qwen3ForCausalLM)


def llama3(**values: Any) -> dict[str, Any]:
    """Return llama31's scaling, which with these values changes every kind of frequency of a tiny head."""
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0} | values
    return {"rope_scaling": {"rope_type": "llama3", "original_max_position_embeddings": 64, **scaling}}


def yarn(**values: Any) -> dict[str, Any]:
    """Return the scaling with which a Qwen's folder is given a longer context; some frequencies of every kind."""
    scaling = {"factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 8.0, "beta_slow": 0.5}
    return {"rope_scaling": {"rope_type": "yarn", **scaling, **values}}


FAMILIES: dict[str, Made] = {
    "llama2": (*LLAMA, {"rms_norm_eps": 1e-5}),
    "llama3": (*LLAMA, {"num_key_value_heads": 2, "rope_theta": 5e5, "rms_norm_eps": 1e-5}),
    "llama31": (*LLAMA, {"num_key_value_heads": 2, "rope_theta": 5e5, "rms_norm_eps": 1e-5, **llama3()}),
    "llama32": (
        *LLAMA,
        {"num_key_value_heads": 1, "tie_word_embeddings": True, "head_dim": 24, "rope_theta": 5e5}
        | llama3(factor=32.0, low_freq_factor=0.5, high_freq_factor=3.0),
    ),
    "mistral": (*MISTRAL, {"num_key_value_heads": 2, "head_dim": 24, "sliding_window": None}),
    "qwen2": (*QWEN2, {"num_key_value_heads": 4, "tie_word_embeddings": True, "rope_theta": 1e6}),
    "qwen25": (*QWEN2, {"num_key_value_heads": 2, "use_sliding_window": False, "sliding_window": 64}),
    "qwen25_yarn": (*QWEN2, {"num_key_value_heads": 2, **yarn()}),
    "qwen3": (*QWEN3, {"num_key_value_heads": 2, "head_dim": 24, "rope_theta": 1e6}),
    "qwen3_yarn": (
        *QWEN3,
        {"num_key_value_heads": 2, "head_dim": 24, "rope_theta": 1e6}
        | yarn(truncate=False, mscale=2.0, mscale_all_dim=0.5),
    ),
    "qwen3_tied": (*QWEN3, {"num_key_value_heads": 1, "head_dim": 16, "tie_word_embeddings": True}),
}
"""Every family with what tells it from the others: tied and untied heads, groupings, sizes of heads."""

MIXTRAL, QWEN3_MOE = (MixtralConfig, MixtralForCausalLM), (Qwen3MoeConfig, Qwen3MoeForCausalLM)
GATE = {"num_experts": 8, "num_experts_per_tok": 3, "norm_topk_prob": True, "num_key_value_heads": 2}
MOES: dict[str, Made] = {
    "mixtral": (*MIXTRAL, {"num_local_experts": 4, "num_key_value_heads": 2, "head_dim": 24}),
    "qwen3_moe": (*QWEN3_MOE, GATE | {"moe_intermediate_size": 40, "head_dim": 24}),
    "qwen3_moe_dense_layers": (*QWEN3_MOE, GATE | {"moe_intermediate_size": 40, "decoder_sparse_step": 2}),
}
"""MoEs of others, whose gate is ours without its normalisation."""


def saved(name: str, folder: Path, seed: int = 0, **config: Any) -> Any:
    """Save a family's model in float32, and return it; `config` changes its configuration."""
    torch.manual_seed(seed)
    config_class, model_class, values = (FAMILIES | MOES)[name]
    model: Any = model_class(config_class(**(SIZES | values | config)))
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith(".gate.weight"):  # a router whose choices are clear
            torch.nn.init.normal_(parameter.data)
        if (
            parameter.dim() == 1
        ):  # norms are ones and biases zeros at first, which would hide that they are lost
            mean, std = (0.0, 0.5) if parameter_name.endswith("bias") else (1.0, 0.2)
            torch.nn.init.normal_(parameter.data, mean=mean, std=std)
    model.save_pretrained(folder, max_shard_size="100KB")
    return model.eval()
