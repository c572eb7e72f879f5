"""Hugging Face's config.json as a description of a model. Every value is read, logged, or refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_skymoe.architecture import Architecture
from nemo_skymoe.checkpoint import rope
from nemo_skymoe.checkpoint.config_values import ConfigValues, read_json
from nemo_skymoe.checkpoint.description import Description
from nemo_skymoe.checkpoint.hugging_face import unfamiliar
from nemo_skymoe.checkpoint.hugging_face.families import CLASSES, FAMILIES
from nemo_skymoe.checkpoint.hugging_face.foreign_tensors import check_quantization
from nemo_skymoe.checkpoint.tensors.model import ITEM_SIZES
from nemo_skymoe.durable.errors import CheckpointError, ConfigurationError

_FULL_LAYERS = 28
"""Layers of a Qwen without a window, if it has the switch and says nothing."""


def read(folder: Path) -> Description:
    """Return the description in a folder's config.json.

    Raises:
        CheckpointError: It is missing or wrong, or describes a model that has no place here.
    """
    return from_hf_config(read_json(folder / "config.json"), str(folder / "config.json"))


def from_hf_config(raw: Mapping[str, Any], place: str = "config.json") -> Description:
    """Read a parsed config.json; `place` is what messages call it. Errors as `read`."""
    values = ConfigValues(dict(raw), place)
    family = _family(values)
    experts = _num_experts(values, family)
    layers = _layers(values, family) if experts is not None else {}
    attention = _attention(values, family)
    gate = 1.0 if experts is None else _gate(values, family)
    _refuse_what_has_no_place(values, family)
    theta, scaling = _rope(values, family)
    description = Description(
        architecture=_architecture(values, family, experts, layers | attention),
        family=family,
        rope_theta=theta,
        rope_scaling=scaling,
        rms_norm_eps=values.number("rms_norm_eps", FAMILIES[family].eps),
        max_position_embeddings=values.size("max_position_embeddings", FAMILIES[family].context),
        dtype=_dtype(values),
        bos_token_id=_token_id(values, "bos_token_id"),
        eos_token_id=_token_id(values, "eos_token_id"),
        pad_token_id=_token_id(values, "pad_token_id"),
        moe_router_logit_norm_scale=gate,
        raw=dict(raw),
    )
    _check_window(values, family, description.max_position_embeddings)
    values.log_unknown()
    return description


def _family(values: ConfigValues) -> str:
    names = values.value("architectures", None)
    kind = values.value("model_type", None)
    name = names[0] if isinstance(names, list) and names else None
    family = kind if names is None else CLASSES.get(name) if isinstance(name, str) else None
    if not isinstance(family, str) or family not in FAMILIES:
        raise values.wrong("architectures", f"one of {', '.join(CLASSES)}")
    return family


def _attention(values: ConfigValues, family: str) -> dict[str, Any]:
    """Return what attention has beside its matrices. It belongs to a family, except for ours, which has fields for it."""
    if family == "skywork":
        options = ("add_qkv_bias", "qk_layernorm")
        return {
            option: values.flag(option, False) for option in options if values.raw.get(option) is not None
        }
    if FAMILIES[family].has_window_switch:
        values.known("use_sliding_window", "max_window_layers")
    if family == "qwen2":  # transformers gives it biases whatever a field says
        values.known("attention_bias", "qkv_bias")
    return {
        "add_qkv_bias": FAMILIES[family].add_qkv_bias,
        "qk_layernorm": FAMILIES[family].qk_layernorm,
    }


def _layers(values: ConfigValues, family: str) -> dict[str, Any]:
    """Return which layers are dense, and how large an expert is beside them. The fields are Qwen's."""
    if family == "mixtral":
        return {}
    step = values.size("decoder_sparse_step", 1) if family == "qwen3_moe" else 1
    dense = values.value("mlp_only_layers", None) or []
    layers = values.size("num_hidden_layers")
    if not isinstance(dense, list) or any(type(one) is not int or not 0 <= one < layers for one in dense):
        raise values.wrong("mlp_only_layers", f"numbers of layers, from 0 to {layers - 1}")
    size = values.value("moe_intermediate_size", FAMILIES[family].expert_size)
    if size is not None:
        size = values.size("moe_intermediate_size", size)
    return {
        "moe_layer_freq": tuple(
            int(layer not in dense and (layer + 1) % step == 0) for layer in range(layers)
        ),
        "moe_ffn_hidden_size": size,
    }


def _architecture(
    values: ConfigValues, family: str, experts: int | None, further: dict[str, Any]
) -> Architecture:
    heads, hidden = values.size("num_attention_heads"), values.size("hidden_size")
    groups = values.size("num_key_value_heads", FAMILIES[family].groups or heads)
    default_head, rest = divmod(hidden, heads)
    head = default_head
    if rest or FAMILIES[family].head or values.raw.get("head_dim") is not None:
        head = values.size("head_dim", FAMILIES[family].head)
    layers = values.size("num_hidden_layers")
    if layers * (experts or 1) > 1_000_000:
        raise values.wrong("num_hidden_layers", "fewer than a million MLPs in all layers")
    sizes: dict[str, Any] = {
        "num_layers": layers,
        "hidden_size": hidden,
        "ffn_hidden_size": values.size("intermediate_size"),
        "num_attention_heads": heads,
        "vocab_size": values.size("vocab_size"),
        "num_query_groups": None if groups == heads else groups,
        "kv_channels": None if head == default_head and not rest else head,
        "num_moe_experts": experts,
        "moe_router_topk": 2
        if experts is None
        else values.size("num_experts_per_tok", FAMILIES[family].topk),
        "tied_embeddings": values.flag("tie_word_embeddings", False),
        **further,
    }
    try:
        return Architecture(**sizes)
    except ConfigurationError as reason:
        raise CheckpointError(f"{values.place}: {reason}") from None


def _num_experts(values: ConfigValues, family: str) -> int | None:
    """Return the experts of a layer: the release writes `num_experts: [16]`, others `num_local_experts`, or a number."""
    counts: set[int] = set()
    for name in ("num_experts", "num_local_experts"):
        value = values.value(name, None)
        if isinstance(value, list) and 0 in value and any(value):
            raise values.wrong(name, "the experts of MoE layers; dense layers are named in mlp_only_layers")
        for count in value if isinstance(value, list) else [value]:
            if count is None or (count == 0 and not isinstance(count, bool)):
                continue
            if isinstance(count, bool) or not isinstance(count, int) or count < 0:
                raise values.wrong(name, "a positive integer, or a list of one")
            counts.add(count)
    if len(counts) > 1:
        raise values.wrong("num_experts", "the same number in every layer, and as num_local_experts")
    count = counts.pop() if counts else None
    never_dense = FAMILIES[family].experts
    if count is not None and never_dense is None and family != "skywork":
        raise values.wrong(
            "architectures",
            "SkyworkForCausalLM, MixtralForCausalLM or Qwen3MoeForCausalLM for a model with experts",
        )
    if count is None and never_dense is not None:
        name = "num_local_experts" if family == "mixtral" else "num_experts"
        count = values.size(name, None if name in values.raw else never_dense)
    return count


def _gate(values: ConfigValues, family: str) -> float | None:
    """Return the gate's settings; where the release's config.json is silent, what its serving code does."""
    if family == "qwen3_moe" and values.value("norm_topk_prob", None) is not True:
        raise values.wrong(
            "norm_topk_prob",
            "true: with false, its default, a token's experts are weighted by their share among all experts, and here"
            " always by that among the chosen ones",
        )
    if (
        family != "skywork"
    ):  # softmax over all, divided by the sum of the top k: the gate here without its norm
        return None
    if values.value("moe_expert_interval", 1) != 1:
        raise values.wrong("moe_expert_interval", "1: experts in every layer")
    if values.flag("moe_2layer_gate", False):
        raise values.wrong("moe_2layer_gate", "false: the released gate is one matrix")
    # Softmax before or after the top-k is the same function once the k weights are divided by their sum.
    mixtral = values.flag("moe_use_mixtral_gating", False)
    if not values.flag("moe_feature_no_mul_topk", True) and not mixtral:
        raise values.wrong(
            "moe_feature_no_mul_topk",
            "true: with false the authors' layer multiplies the experts' input by the top-k, which their server"
            " does not; set it to true where the weights were made for the server",
        )
    if not values.flag("moe_use_logits_norm", True):
        return None
    return values.number("moe_gate_norm_std", 1.0)


def _rope(values: ConfigValues, family: str) -> tuple[float, dict[str, Any] | None]:
    """Return theta, and the scaling under `rope_type`."""
    theta, scaling = _theta_and_scaling(values, FAMILIES[family].theta)
    if scaling is None:
        return theta, None
    if not isinstance(scaling, dict):
        raise values.wrong("rope_scaling", "null or an object with a type")
    inner = ConfigValues(scaling, f"{values.place}: rope_scaling")
    if scaling.get("partial_rotary_factor") not in (None, 1.0):
        raise inner.wrong("partial_rotary_factor", "1: rotary embedding of the whole head")
    kind = scaling.get("rope_type") or scaling.get("type", "default")
    if not isinstance(kind, str) or scaling.get("type", kind) != kind:
        raise inner.wrong("type", f"a string, the same as rope_type ({kind!r})")
    if kind == "default":
        return theta, None
    if kind in ("linear", "ntk"):
        factor = inner.number("factor")
        if kind == "ntk":
            return theta * factor, None
    rest = {name: value for name, value in scaling.items() if name not in ("type", "rope_theta")}
    length = values.size("max_position_embeddings", FAMILIES[family].context)
    return theta, rope.canonical({**rest, "rope_type": kind}, length)


def _theta_and_scaling(values: ConfigValues, default: float) -> tuple[float, Any]:
    """Both are read from transformers 5's `rope_parameters`, which may leave theta outside, or from the fields of 4. These must agree."""
    parameters, scaling = values.value("rope_parameters", None), values.value("rope_scaling", None)
    if parameters is None:
        return values.number("rope_theta", default), scaling
    if not isinstance(parameters, dict) or any(isinstance(value, dict) for value in parameters.values()):
        raise values.wrong("rope_parameters", "one object for all layers")
    if scaling is not None and scaling != parameters:
        raise values.wrong("rope_scaling", f"null or the same as rope_parameters ({parameters!r})")
    if parameters.get("rope_theta") is None:
        return values.number("rope_theta", default), parameters
    theta = ConfigValues(parameters, f"{values.place}: rope_parameters").number("rope_theta")
    outside = values.value("rope_theta", None)
    if outside not in (None, theta):
        raise values.wrong("rope_theta", f"null or that of rope_parameters ({theta!r})")
    return theta, parameters


def _dtype(values: ConfigValues) -> str:
    values.known("torch_dtype", "dtype")
    name = str(values.raw.get("torch_dtype") or values.raw.get("dtype") or "bfloat16").removeprefix("torch.")
    if name not in ITEM_SIZES:
        raise values.wrong("torch_dtype", f"one of {', '.join(ITEM_SIZES)}")
    return name


def _token_id(values: ConfigValues, name: str) -> Any:
    value = values.value(name, None)
    ids = value if isinstance(value, list) and name == "eos_token_id" else [value]
    if any(isinstance(i, bool) or not isinstance(i, int | None) for i in ids):
        raise values.wrong(name, "an integer or null")
    return value


def _refuse_what_has_no_place(values: ConfigValues, family: str) -> None:
    for name in ("attention_bias", "mlp_bias", "bias", "qkv_bias"):
        if not values.asked(name) and values.value(name, None):
            raise values.wrong(
                name,
                "false: a model here may have biases of queries, keys and values alone, as Qwen2ForCausalLM has them, and"
                " Megatron has none of the output projection without those of every MLP",
            )
    if values.value("hidden_act", "silu") not in ("silu", "swish"):
        raise values.wrong("hidden_act", "'silu'")
    if values.value("partial_rotary_factor", None) not in (None, 1.0):
        raise values.wrong("partial_rotary_factor", "1: rotary embedding of the whole head")
    for name in ("quantization_config", "quantization", "compression_config"):
        check_quantization(name, values.value(name, None), values.wrong)
    unfamiliar.check(values)


def _check_window(values: ConfigValues, family: str, context: int) -> None:
    """Refuse an attention window, unless it hides nothing inside the context."""
    window = values.value(
        "sliding_window", None if "sliding_window" in values.raw else FAMILIES[family].window
    )
    if FAMILIES[family].has_window_switch and not _switched_on(values, family):
        window = None
    if window is not None and (not isinstance(window, int) or window < context):
        raise values.wrong(
            "sliding_window", f"null, or at least max_position_embeddings ({context}): attention here is full"
        )
    layers = values.value("layer_types", None)
    if layers is not None and (
        not isinstance(layers, list) or any(layer != "full_attention" for layer in layers)
    ):
        raise values.wrong("layer_types", "'full_attention' in every layer")


def _switched_on(values: ConfigValues, family: str) -> bool:
    """Say whether a layer of a Qwen uses the window: it has a switch and, unless it is an MoE, layers without one."""
    switch, full = values.raw.get("use_sliding_window"), values.raw.get("max_window_layers", _FULL_LAYERS)
    if switch not in (None, False, True):
        raise values.wrong("use_sliding_window", "true or false")
    if not switch or family == "qwen3_moe":
        return bool(switch)
    if isinstance(full, bool) or not isinstance(full, int) or full < 0:
        raise values.wrong("max_window_layers", "a number of layers")
    # Each of `layer_types` is looked at.
    return values.value("layer_types", None) is None and full < values.size("num_hidden_layers")
