"""Hugging Face checkpoints as tables of chunks: Llama's names, the released Skywork-MoE's, and its authors' own."""

from __future__ import annotations

from nemo_skymoe.architecture import Architecture
from nemo_skymoe.checkpoint.mapping import Chunk, Part
from nemo_skymoe.checkpoint.tensors import Key, key_shape, model_keys

_NAMES = {
    "embedding": "model.embed_tokens",
    "attention_norm": "input_layernorm",
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "attention_output": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
    "final_norm": "model.norm",
    "output": "lm_head",
}
EMBEDDING, HEAD = (f"{_NAMES[kind]}.weight" for kind in ("embedding", "output"))
NAMINGS = {
    "skywork": {
        "router": "block_sparse_moe.gate",
        "gate": "block_sparse_moe.experts.{}.w1",
        "up": "block_sparse_moe.experts.{}.w3",
        "down": "block_sparse_moe.experts.{}.w2",
    },
    "authors": {
        "router": "mlp.moe.gate.wg",
        "gate": "mlp.moe.experts.experts.{}.up_proj",
        "up": "mlp.moe.experts.experts.{}.up_proj",
        "down": "mlp.moe.experts.experts.{}.down_proj",
    },
}
"""Of an MoE's own tensors: the release's, and that of the authors' trainer and their later MoE++, where `up_proj`
holds the gate's rows before its own."""


def chunks(architecture: Architecture, naming: str = "skywork") -> list[Chunk]:
    """Every stored tensor of a model: 471 for Skywork-13B, 2863 for Skywork-MoE.

    Args:
        architecture: A dense model has Llama's names whatever `naming` is.
        naming: Of the experts, one of NAMINGS.
    """
    parts: dict[str, list[Part]] = {}
    for key in model_keys(architecture):
        rows = key_shape(architecture, key)[0]
        parts.setdefault(_name(key, naming), []).append(Part(key, 0, rows))
    return [
        Chunk(name, (sum(part.stop for part in rows), *_columns(architecture, rows)), tuple(rows))
        for name, rows in parts.items()
    ]


def _name(key: Key, naming: str) -> str:
    of_moe = key.expert is not None or key.kind == "router"
    name = NAMINGS[naming][key.kind].format(key.expert) if of_moe else _NAMES[key.kind]
    layer = "" if key.layer is None else f"model.layers.{key.layer}."
    return f"{layer}{name}.weight"


def _columns(architecture: Architecture, rows: list[Part]) -> tuple[int, ...]:
    key = rows[0].key
    assert key is not None
    return key_shape(architecture, key)[1:]
