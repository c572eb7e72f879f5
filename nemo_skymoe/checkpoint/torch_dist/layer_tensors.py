"""The tensors that Megatron gives a layer, with their shapes and the options that decide them."""

import re
from typing import Any

LAYER = re.compile(r"(?:module\.)?decoder\.layers\.(?:(\d+)\.)?((?:self_attention|mlp)\.[\w.]+)")
"""A tensor of a layer in a checkpoint: the layer's number, or None if equal layers are stacked, and the name in the
layer."""
LEAST_OTHER_VOCABULARY = 128 * 32
"""Rows beyond `vocab_size` that padding cannot explain: `make_vocab_size_divisible_by` x tensor parallelism."""

Expected = dict[str, tuple[str, Any, tuple[int, ...] | None]]
"""For each tensor an option, its value, and the shape of one layer's tensor, or None if the option says there is none.
"""


def expected_layer(config: Any, is_moe: bool) -> Expected:
    """Return the tensors of a layer that depend on the configuration, without the two norms that every layer has."""
    return _attention(config) | (_experts(config) if is_moe else _dense(config))


def expected_globals(config: Any) -> dict[str, tuple[str, Any, bool]]:
    """Return the tensors outside of layers that an option decides: the option, its value, and whether there is one."""
    tied = bool(config.share_embeddings_and_output_weights)
    positions = getattr(config, "position_embedding_type", "rope")
    return {
        "output_layer.weight": ("share_embeddings_and_output_weights", tied, not tied),
        "embedding.position_embeddings.weight": (
            "position_embedding_type",
            positions,
            positions == "learned_absolute",
        ),
    }


def _attention(config: Any) -> Expected:
    hidden, heads = config.hidden_size, config.num_attention_heads
    groups = config.num_query_groups or heads
    channels = config.kv_channels or hidden // heads
    sizes = (
        "num_attention_heads, num_query_groups and kv_channels",
        f"{heads}, {groups} and {channels}",
    )
    rows = (heads + 2 * groups) * channels
    norm = ("qk_layernorm", config.qk_layernorm, (channels,) if config.qk_layernorm else None)
    bias = bool(config.add_bias_linear)
    qkv_bias = bias or bool(config.add_qkv_bias)
    return {
        "self_attention.linear_qkv.weight": (*sizes, (rows, hidden)),
        "self_attention.linear_proj.weight": (*sizes, (hidden, heads * channels)),
        "self_attention.linear_qkv.bias": (
            "add_qkv_bias or add_bias_linear",
            qkv_bias,
            (rows,) if qkv_bias else None,
        ),
        "self_attention.linear_proj.bias": ("add_bias_linear", bias, (hidden,) if bias else None),
        "self_attention.q_layernorm.weight": norm,
        "self_attention.k_layernorm.weight": norm,
    }


def _dense(config: Any) -> Expected:
    return _mlp(config, "mlp", "ffn_hidden_size", config.ffn_hidden_size)


def _mlp(config: Any, module: str, option: str, size: int | None) -> Expected:
    """Return the tensors of an MLP and its biases, or none if `size` is None or 0."""
    bias, hidden = bool(config.add_bias_linear), config.hidden_size
    first = (2 if config.gated_linear_unit else 1) * (size or 0)
    weights: Expected = {
        f"{module}.linear_fc1.weight": (option, size, (first, hidden) if size else None),
        f"{module}.linear_fc2.weight": (option, size, (hidden, size) if size else None),
    }
    biases: Expected = {
        f"{module}.linear_fc1.bias": ("add_bias_linear", bias, (first,) if bias and size else None),
        f"{module}.linear_fc2.bias": ("add_bias_linear", bias, (hidden,) if bias and size else None),
    }
    return weights | biases


def _experts(config: Any) -> Expected:
    experts, hidden = config.num_moe_experts, config.hidden_size
    own = getattr(config, "moe_ffn_hidden_size", None)
    option, size = (
        ("ffn_hidden_size", config.ffn_hidden_size) if own is None else ("moe_ffn_hidden_size", own)
    )
    routed: Expected = {
        tensor.replace("mlp.", "mlp.experts.experts.", 1): (said, value, shape and (experts, *shape))
        for tensor, (said, value, shape) in _mlp(config, "mlp", option, size).items()
    }
    shared = config.moe_shared_expert_intermediate_size
    gate = bool(shared and getattr(config, "moe_shared_expert_gate", False))
    one = _mlp(config, "mlp.shared_experts", "moe_shared_expert_intermediate_size", shared)
    one["mlp.shared_experts.gate_weight"] = (
        "moe_shared_expert_gate",
        gate,
        (1, hidden) if gate else None,
    )
    return routed | one | _router(config)


def _router(config: Any) -> Expected:
    experts, hidden = config.num_moe_experts, config.hidden_size
    two_layer = bool(getattr(config, "moe_router_two_layer_gate", False))
    bias = bool(getattr(config, "moe_router_gate_bias", False)) or bool(config.add_bias_linear)
    width = 8 * experts
    return {
        "mlp.router.hidden_weight": (
            "moe_router_two_layer_gate",
            two_layer,
            (width, hidden) if two_layer else None,
        ),
        "mlp.router.weight": (
            "num_moe_experts",
            experts,
            (experts, width if two_layer else hidden),
        ),
        "mlp.router.bias": ("moe_router_gate_bias", bias, (experts,) if bias else None),
    }
