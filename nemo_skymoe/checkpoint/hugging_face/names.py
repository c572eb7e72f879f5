"""Hugging Face's names: Llama's and Qwen's, the released Skywork-MoE's, and its authors' own."""

from __future__ import annotations

from typing import Literal

from nemo_skymoe.architecture import Architecture
from nemo_skymoe.checkpoint.tensors.mapping import Chunk
from nemo_skymoe.checkpoint.tensors.table import Line, below, entries, shape_of

Naming = Literal["skywork", "authors", "qwen3_moe"]
"""Experts are named as in the release and in Mixtral, as by the authors' trainer and their later MoE++, or as in Qwen3-MoE."""
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TABLE = (
    Line(EMBEDDING, "embedding"),
    Line("model.layers.{layer}.input_layernorm.weight", "attention_norm"),
    Line("model.layers.{layer}.self_attn.q_proj.weight", "query"),
    Line("model.layers.{layer}.self_attn.k_proj.weight", "key"),
    Line("model.layers.{layer}.self_attn.v_proj.weight", "value"),
    Line("model.layers.{layer}.self_attn.q_proj.bias", "query_bias", "add_qkv_bias"),
    Line("model.layers.{layer}.self_attn.k_proj.bias", "key_bias", "add_qkv_bias"),
    Line("model.layers.{layer}.self_attn.v_proj.bias", "value_bias", "add_qkv_bias"),
    Line("model.layers.{layer}.self_attn.q_norm.weight", "query_norm", "qk_layernorm"),
    Line("model.layers.{layer}.self_attn.k_norm.weight", "key_norm", "qk_layernorm"),
    Line("model.layers.{layer}.self_attn.o_proj.weight", "attention_output"),
    Line("model.layers.{layer}.post_attention_layernorm.weight", "mlp_norm"),
    Line("model.layers.{layer}.mlp.gate_proj.weight", "gate", "dense"),
    Line("model.layers.{layer}.mlp.up_proj.weight", "up", "dense"),
    Line("model.layers.{layer}.mlp.down_proj.weight", "down", "dense"),
    Line("model.layers.{layer}.block_sparse_moe.gate.weight", "router", "moe skywork"),
    Line("model.layers.{layer}.block_sparse_moe.experts.{expert}.w1.weight", "gate", "moe skywork"),
    Line("model.layers.{layer}.block_sparse_moe.experts.{expert}.w3.weight", "up", "moe skywork"),
    Line("model.layers.{layer}.block_sparse_moe.experts.{expert}.w2.weight", "down", "moe skywork"),
    Line("model.layers.{layer}.mlp.moe.gate.wg.weight", "router", "moe authors"),
    Line(
        "model.layers.{layer}.mlp.moe.experts.experts.{expert}.up_proj.weight",
        below("gate", "up"),
        "moe authors",
    ),
    Line("model.layers.{layer}.mlp.moe.experts.experts.{expert}.down_proj.weight", "down", "moe authors"),
    Line("model.layers.{layer}.mlp.gate.weight", "router", "moe qwen3_moe"),
    Line("model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight", "gate", "moe qwen3_moe"),
    Line("model.layers.{layer}.mlp.experts.{expert}.up_proj.weight", "up", "moe qwen3_moe"),
    Line("model.layers.{layer}.mlp.experts.{expert}.down_proj.weight", "down", "moe qwen3_moe"),
    Line("model.norm.weight", "final_norm"),
    Line(HEAD, "output"),
)


def chunks(architecture: Architecture, naming: Naming = "skywork") -> list[Chunk]:
    """Return every stored tensor of a model: 471 for Skywork-13B, 2863 for Skywork-MoE.

    Args:
        architecture: A dense model has Llama's names whatever `naming` is.
        naming: The naming of the experts.
    """
    found = []
    for line, layer, expert in entries(TABLE, architecture, naming):
        parts = line.parts(architecture, layer, expert)
        name = line.name.format(layer=layer, expert=expert)
        found.append(Chunk(name, shape_of(architecture, parts), parts))
    return found
