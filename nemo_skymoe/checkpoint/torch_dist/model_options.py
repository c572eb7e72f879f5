"""A description as the options of Megatron that build its model: what both NeMo's and Bridge's configuration say."""

from __future__ import annotations

from typing import Any

from nemo_skymoe.checkpoint import rope
from nemo_skymoe.checkpoint.description import Description


def model_options(description: Description, padded_vocab_size: int) -> dict[str, Any]:
    """Return the options in which models differ, as plain values.

    Args:
        description: The model's description.
        padded_vocab_size: Rows of embedding and head, with which the model is to be built.

    Raises:
        ConfigurationError: The model scales its rotary embedding in a way that is not carried over to Megatron.
    """
    architecture, theta = description.architecture, description.rope_theta
    options = architecture.megatron_sizes() | {
        "seq_length": description.max_position_embeddings,
        "vocab_size": padded_vocab_size,
        "rotary_base": int(theta) if theta.is_integer() else theta,
        **rope.megatron_options(description.rope_scaling),
        "layernorm_epsilon": description.rms_norm_eps,
        "share_embeddings_and_output_weights": architecture.tied_embeddings,
    }
    if architecture.num_moe_experts is not None:
        options |= {
            "num_moe_experts": architecture.num_moe_experts,
            "moe_router_topk": architecture.moe_router_topk,
            "moe_router_logit_norm_scale": description.moe_router_logit_norm_scale,
            "moe_router_logit_norm_correction": description.moe_router_logit_norm_correction,
        }
    if architecture.layers_differ:
        options |= {
            "moe_layer_freq": [int(moe) for moe in architecture.moe_layers],
            "moe_ffn_hidden_size": architecture.expert_ffn_hidden_size,
        }
    return options


def llama_options() -> dict[str, Any]:
    """Return the options that all models here share. A function is a `_target_` that is not called."""
    return {
        "normalization": "RMSNorm",
        "activation_func": uncalled("torch.nn.functional.silu"),
        "gated_linear_unit": True,
        "add_bias_linear": False,
        "position_embedding_type": "rope",
    }


def uncalled(name: str) -> dict[str, Any]:
    """Return a function or a data type as NeMo and Bridge write it into YAML, by its dotted name."""
    return {"_target_": name, "_call_": False}
