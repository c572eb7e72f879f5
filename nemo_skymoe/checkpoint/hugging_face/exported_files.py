"""The files beside the weights in Hugging Face's form: configuration, our modeling files, and what travels with them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_skymoe.architecture import Architecture
from nemo_skymoe.checkpoint.companions import companion_files
from nemo_skymoe.checkpoint.description import Description
from nemo_skymoe.checkpoint.hugging_face.families import FAMILIES, layout_of

EXPORT = Path(__file__).parent / "export"
MODELING_FILES = ("configuration_skywork.py", "modeling_skywork.py")
AUTO_MAP = {
    "AutoConfig": "configuration_skywork.SkyworkConfig",
    "AutoModelForCausalLM": "modeling_skywork.SkyworkForCausalLM",
}
_OF_ONE_FAMILY = (
    *(
        "num_experts",
        "num_local_experts",
        "norm_topk_prob",
        "decoder_sparse_step",
        "add_qkv_bias",
        "qk_layernorm",
    ),
    *("moe_expert_interval", "moe_2layer_gate", "moe_use_mixtral_gating", "moe_use_logits_norm"),
    *("moe_gate_norm_std", "moe_feature_no_mul_topk"),
)
_WINDOWS = ("sliding_window", "layer_types", "use_sliding_window", "max_window_layers")


def to_hf_config(description: Description, layout: str | None = None) -> dict[str, Any]:
    """Return the config.json of a description: what was read, with the values that no longer hold replaced.

    `layout` is that of `families.layout_of`.

    An MoE has the fields that the release is known to have. A gate trained with the population standard deviation
    is written with the norm that gives the same function under the release's sample standard deviation.
    """
    architecture = description.architecture
    family = layout_of(description, layout)
    # transformers 5 reads the older rope fields, 4 does not know `rope_parameters`.
    stale = {"auto_map", "quantization_config", "rope_parameters", "mlp_only_layers", "moe_intermediate_size"}
    if family != description.family:
        stale |= {*_WINDOWS, *_OF_ONE_FAMILY}
    config = {name: value for name, value in description.raw.items() if name not in stale}
    config |= {
        "architectures": [FAMILIES[family].class_name],
        "model_type": family,
        "hidden_act": "silu",
        "hidden_size": architecture.hidden_size,
        "intermediate_size": architecture.ffn_hidden_size,
        "max_position_embeddings": description.max_position_embeddings,
        "num_attention_heads": architecture.num_attention_heads,
        "num_hidden_layers": architecture.num_layers,
        "num_key_value_heads": architecture.query_groups,
        "rms_norm_eps": description.rms_norm_eps,
        "rope_scaling": None if description.rope_scaling is None else dict(description.rope_scaling),
        "rope_theta": description.rope_theta,
        "tie_word_embeddings": architecture.tied_embeddings,
        "dtype" if "dtype" in description.raw else "torch_dtype": description.dtype,
        "vocab_size": architecture.vocab_size,
        "bos_token_id": description.bos_token_id,
        "eos_token_id": description.eos_token_id,
        "pad_token_id": description.pad_token_id,
    }
    # A Qwen3 that does not say it has heads of 128, and transformers 4 finds no YaRN for a Mixtral that says nothing.
    said = architecture.kv_channels is not None or config.get("head_dim") is not None
    if said or FAMILIES[family].head or (description.rope_scaling or {}).get("rope_type") == "yarn":
        config["head_dim"] = architecture.head_size
    tokenizers = {k: v for k, v in _auto_map(description).items() if k == "AutoTokenizer"}
    if classes := (AUTO_MAP if family == "skywork" else {}) | tokenizers:
        config["auto_map"] = classes
    if FAMILIES[family].window is not None:  # which is there unless the file says null
        config.setdefault("sliding_window", None)
    if family == "skywork":
        options = {name: getattr(architecture, name) for name in ("add_qkv_bias", "qk_layernorm")}
        config |= {name: value for name, value in options.items() if value}
    if family in _FAMILIES_OF_MOES:
        return config | _FAMILIES_OF_MOES[family](architecture, description.raw)
    return config | _moe_fields(description)


def config_file(description: Description, layout: str | None = None) -> bytes:
    """Return the content of `to_hf_config` as it is written: the same bytes for the same description."""
    return (json.dumps(to_hf_config(description, layout), indent=2, sort_keys=True) + "\n").encode()


def _mixtral_fields(architecture: Architecture, _: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "num_local_experts": architecture.num_moe_experts,
        "num_experts_per_tok": architecture.moe_router_topk,
    }


def _qwen3_moe_fields(architecture: Architecture, raw: Mapping[str, Any]) -> dict[str, Any]:
    dense = [layer for layer, moe in enumerate(architecture.moe_layers) if not moe]
    fields = {
        "num_experts": architecture.num_moe_experts,
        "num_experts_per_tok": architecture.moe_router_topk,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": dense,
        "moe_intermediate_size": architecture.expert_ffn_hidden_size,
        "head_dim": architecture.head_size,
    }
    if (
        not dense and raw.get("intermediate_size") is not None
    ):  # the size of a dense layer, of which there is none
        fields["intermediate_size"] = raw["intermediate_size"]
    return fields


_FAMILIES_OF_MOES = {"mixtral": _mixtral_fields, "qwen3_moe": _qwen3_moe_fields}


def _auto_map(description: Description) -> dict[str, Any]:
    classes = description.raw.get("auto_map")
    return classes if isinstance(classes, dict) else {}


def _moe_fields(description: Description) -> dict[str, Any]:
    architecture = description.architecture
    experts = architecture.num_moe_experts
    if experts is None:
        return {}
    scale = description.moe_router_logit_norm_scale
    if scale is not None and description.moe_router_logit_norm_correction == 0:
        scale *= math.sqrt(experts / (experts - 1)) if experts > 1 else 1.0
    fields = {
        "num_experts": [experts],
        "num_experts_per_tok": architecture.moe_router_topk,
        "moe_expert_interval": 1,
        "moe_2layer_gate": False,
        "moe_use_mixtral_gating": bool(description.raw.get("moe_use_mixtral_gating")),
        "moe_use_logits_norm": scale is not None,
        "moe_gate_norm_std": 1.0 if scale is None else scale,
        "moe_feature_no_mul_topk": True,
    }
    if architecture.layers_differ:
        fields["mlp_only_layers"] = [layer for layer, moe in enumerate(architecture.moe_layers) if not moe]
        fields["moe_intermediate_size"] = architecture.expert_ffn_hidden_size
    return fields | ({"num_local_experts": experts} if "num_local_experts" in description.raw else {})


def extras(description: Description, folder: Path | None, layout: str | None = None) -> dict[str, bytes]:
    """Return every file beside the weights, by relative path: the same bytes for the same arguments.

    Args:
        description: The description of the model that is written.
        folder: The folder of the files that travel with it, if there is one.
        layout: That of `families.layout_of`.

    Raises:
        CheckpointError: The same as from `companion_files`.
    """
    files = {"config.json": config_file(description, layout)}
    if folder is not None:
        files |= companion_files(folder)
    if layout_of(description, layout) == "skywork":
        files |= {name: (EXPORT / name).read_bytes() for name in MODELING_FILES}
    return files
