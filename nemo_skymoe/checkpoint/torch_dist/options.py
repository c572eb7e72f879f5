"""The options that a Megatron checkpoint keeps of its model: NeMo's, Bridge's, or the arguments of Megatron-LM."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_skymoe.architecture import Architecture
from nemo_skymoe.checkpoint import rope, tokenizer
from nemo_skymoe.checkpoint.companions import find_companions
from nemo_skymoe.checkpoint.config_values import read_yaml
from nemo_skymoe.checkpoint.description import Description
from nemo_skymoe.checkpoint.tensors.model import Storage
from nemo_skymoe.checkpoint.torch_dist import run_config, saved_arguments
from nemo_skymoe.checkpoint.torch_dist.storage import WEIGHTS, weights_folder
from nemo_skymoe.durable.errors import CheckpointError, ConfigurationError
from nemo_skymoe.durable.stand_in import refuse_pointers

CONTEXT = "context"
HF_CONFIG = "config.json"
"""The context of a converted checkpoint, beside the tensors of Bridge's too, holds the config.json of its source, so that
nothing of it is lost."""
logger = logging.getLogger(__name__)

SUPPORTED: dict[str, tuple[Any, ...]] = {
    "normalization": ("RMSNorm",),
    "position_embedding_type": ("rope", "yarn"),
    "rotary_percent": (1.0,),
    "rotary_interleaved": (False,),
    "gated_linear_unit": (True,),
    "activation_func": ("torch.nn.functional.silu", "torch._C._nn.silu"),
    "add_bias_linear": (False,),
    "layernorm_zero_centered_gamma": (False,),
    "apply_residual_connection_post_layernorm": (False,),
    "multi_latent_attention": (False,),
    "mtp_num_layers": (None, 0),
    "window_size": (None,),
    "qk_l2_norm": (False,),
    "softmax_type": ("vanilla",),
    "softmax_scale": (None,),
    "attention_output_gate": (False,),
    "experimental_attention_variant": (None,),
    "linear_attention_freq": (None,),
    "no_rope_freq": (None,),
    "use_mup": (False,),
    "glu_linear_offset": (0,),
    "activation_func_clamp_value": (None,),
    "heterogeneous_block_specs": (False,),
    "is_hybrid_model": (False,),
}
"""The values with which a Megatron model computes what a Llama does; an option that is not there has its default."""
SUPPORTED_MOE: dict[str, tuple[Any, ...]] = {
    "moe_router_score_function": ("softmax",),
    "moe_router_pre_softmax": (False,),
    "moe_router_topk_scaling_factor": (None,),
    "moe_router_num_groups": (None,),
    "moe_router_group_topk": (None,),
    "moe_router_enable_expert_bias": (False,),
    "moe_router_logit_norm_correction": (0, 1),
    "moe_router_gate_bias": (False,),
    "moe_router_two_layer_gate": (False,),
    "moe_shared_expert_intermediate_size": (None,),
    "moe_apply_probs_on_input": (False,),
    "moe_latent_size": (None,),
}
"""The same for a Skywork-MoE, of whose layers some may be dense."""

MEGATRON_LM = {
    "norm_epsilon": "layernorm_epsilon",
    "num_experts": "num_moe_experts",
    "max_position_embeddings": "seq_length",
    "swiglu": "gated_linear_unit",
    "apply_layernorm_1p": "layernorm_zero_centered_gamma",
    "rotary_seq_len_interpolation_factor": "seq_len_interpolation_factor",
    "use_rope_scaling": "rope_scaling",
}
"""Megatron-LM's arguments that are not called as the options that they set."""
_MEGATRON_LM_YARN = {
    "rotary_scaling_factor": "yarn_rotary_scaling_factor",
    "mscale": "yarn_mscale",
    "mscale_all_dim": "yarn_mscale_all_dim",
}
"""Those that belong to YaRN if that is the embedding, and otherwise to latent attention."""


def config_file(folder: Path) -> Path | None:
    """Return the config.json in a checkpoint's context, if there is one."""
    file = _context(weights_folder(folder)) / HF_CONFIG
    return file if file.is_file() else None


def describe(folder: Path, storage: Storage) -> Description:
    """Return the model whose tensors are `storage`, from its options: the context's, Bridge's, or the saved arguments.

    Raises:
        CheckpointError: Neither is there, or they describe a model of another kind.
    """
    weights = weights_folder(folder)
    context = _context(weights)
    dtypes = {info.dtype for info in storage.tensors.values()}
    dtype = dtypes.pop() if len(dtypes) == 1 else "bfloat16"
    if (context / "model.yaml").is_file():
        options = _nemo_options(context)
        return from_options(options, dtype, str(context / "model.yaml"), _family(options))
    if (weights / run_config.RUN_CONFIG).is_file():
        options = _bridge_options(weights)
        return from_options(options, dtype, str(weights / run_config.RUN_CONFIG), _family(options))
    common = saved_arguments.file_of(weights)
    try:
        options = megatron_lm_options(saved_arguments.read(common))
    except CheckpointError as reason:
        raise CheckpointError(
            f"'{folder}' does not say how its attention heads are cut (no context/model.yaml; {reason}): expected"
            " --config with a config.json that describes the model"
        ) from reason
    return from_options(options, dtype, str(common), "llama")


def saved_options(folder: Path) -> dict[str, Any] | None:
    """Return the options that a checkpoint keeps of whatever model it is, by Megatron's names; None if it keeps none.

    Values are as they are written. A function or class is its dotted name.
    """
    weights = weights_folder(folder)
    model_yaml = _context(weights) / "model.yaml"
    try:
        if model_yaml.is_file():
            return _model_options(model_yaml)
        if (weights / run_config.RUN_CONFIG).is_file():
            return run_config.read_model(weights / run_config.RUN_CONFIG)
        return megatron_lm_options(saved_arguments.read(saved_arguments.file_of(weights)))
    except CheckpointError as reason:
        logger.warning("only the sizes of '%s' are compared: %s", folder, reason)
        return None


def _context(weights: Path) -> Path:
    context = (weights.parent if weights.name == WEIGHTS else weights) / CONTEXT
    refuse_pointers(context, HF_CONFIG, "model.yaml", "io.json")
    return context


def from_options(options: Mapping[str, Any], dtype: str, place: str, family: str = "skywork") -> Description:
    """Return the model of Megatron's option values; `place` is what messages call their source.

    Raises:
        CheckpointError: An option is missing, or has a value that no Llama and no Skywork-MoE has.
    """
    experts = options.get("num_moe_experts")
    _check(options, SUPPORTED if experts is None else SUPPORTED | SUPPORTED_MOE, place)
    architecture = _architecture(options, place)
    gate = {
        "moe_router_logit_norm_scale": None
        if options.get("moe_router_logit_norm_scale") is None
        else _number(options, "moe_router_logit_norm_scale", 1.0, place),
        "moe_router_logit_norm_correction": options.get("moe_router_logit_norm_correction", 1),
    }
    return Description(
        architecture,
        family=_family_with(architecture, family),
        rope_theta=_number(options, "rotary_base", 10000.0, place),
        rope_scaling=_rope_scaling(options, place),
        rms_norm_eps=_number(options, "layernorm_epsilon", 1e-5, place),
        max_position_embeddings=_size(options, "seq_length", place),
        dtype=dtype,
        **{name: options.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
        **({} if experts is None else gate),
    )


def _architecture(options: Mapping[str, Any], place: str) -> Architecture:
    heads, hidden = _size(options, "num_attention_heads", place), _size(options, "hidden_size", place)
    groups, channels, experts, expert_size = (
        None if options.get(option) is None else _size(options, option, place)
        for option in ("num_query_groups", "kv_channels", "num_moe_experts", "moe_ffn_hidden_size")
    )
    sizes: dict[str, Any] = dict(
        num_layers=_size(options, "num_layers", place),
        hidden_size=hidden,
        ffn_hidden_size=_size(options, "ffn_hidden_size", place),
        num_attention_heads=heads,
        vocab_size=_size(options, "vocab_size", place),
        num_query_groups=None if groups == heads else groups,
        kv_channels=None if channels is None or channels * heads == hidden else channels,
        num_moe_experts=experts,
        moe_router_topk=2
        if options.get("moe_router_topk") is None
        else _size(options, "moe_router_topk", place),
        tied_embeddings=bool(options.get("share_embeddings_and_output_weights", True)),
        moe_layer_freq=1 if options.get("moe_layer_freq") is None else options["moe_layer_freq"],
        moe_ffn_hidden_size=expert_size,
        add_qkv_bias=bool(options.get("add_qkv_bias")),
        qk_layernorm=bool(options.get("qk_layernorm")),
    )
    try:
        return Architecture(**sizes)
    except ConfigurationError as reason:
        raise CheckpointError(f"{place}: {reason}") from None


def _rope_scaling(options: Mapping[str, Any], place: str) -> dict[str, Any] | None:
    try:
        return rope.scaling_of(options)
    except ConfigurationError as reason:
        raise CheckpointError(f"{place}: {reason}") from None


def _family_with(architecture: Architecture, family: str) -> str:
    """Return Hugging Face's family of a model that Megatron has trained: Qwen's are the only ones with biases or norms."""
    biased, normed = architecture.add_qkv_bias, architecture.qk_layernorm
    if architecture.num_moe_experts is not None or (biased and normed):
        return "skywork"
    return "qwen2" if biased else "qwen3" if normed else family


def _family(options: Mapping[str, Any]) -> str:
    return "skywork" if str(options.get("_target_")).startswith(run_config.OURS) else "llama"


def _model_options(file: Path) -> dict[str, Any]:
    """Return the plain values of `model.yaml`; a function is its dotted name."""
    config = read_yaml(file).get("config")
    if not isinstance(config, dict):
        raise CheckpointError(f"'{file}' has no 'config': expected what NeMo writes of a model")
    return run_config.flat(config)


def _nemo_options(context: Path) -> dict[str, Any]:
    options = _model_options(context / "model.yaml")
    options |= _of_the_tokenizer(find_companions(context), has_padding=True)
    if options.get("vocab_size") is None:
        raise CheckpointError(
            f"'{context}' has no tokenizer and no vocab_size, which would say how much of the embedding is padding:"
            " expected --config with a config.json that describes the model"
        )
    return options


def _bridge_options(weights: Path) -> dict[str, Any]:
    """Return the options in `run_config.yaml`. Only our own provider may count the padding in `vocab_size`.

    Where Bridge itself pads, it has set `vocab_size` to the tokenizer's, whatever the provider said before.
    """
    options = run_config.read_options(weights / run_config.RUN_CONFIG)
    padded_by_bridge = bool(options.get("should_pad_vocab"))
    unpadded = None if padded_by_bridge else options.get("unpadded_vocab_size")
    unsaid = _family(options) == "skywork" and not padded_by_bridge and unpadded is None
    options |= _of_the_tokenizer(find_companions(weights), has_padding=unsaid)
    return options | ({} if unpadded is None else {"vocab_size": unpadded})


def _of_the_tokenizer(folder: Path | None, *, has_padding: bool) -> dict[str, Any]:
    """Return the special tokens' ids, and the vocabulary of a model whose own number has the padding in it."""
    if folder is None:
        return {}
    options: dict[str, Any] = dict(tokenizer.special_ids(folder))
    if has_padding and (tokens := tokenizer.size(folder)) is not None:
        options["vocab_size"] = tokens
        logger.info("vocab_size is %d, the size of '%s'", tokens, folder)
    return options


def megatron_lm_options(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return Megatron-LM's arguments under the names of the options that they set."""
    options = dict(arguments)
    names = MEGATRON_LM | (_MEGATRON_LM_YARN if arguments.get("position_embedding_type") == "yarn" else {})
    options |= {option: arguments[name] for name, option in names.items() if name in arguments}
    if not arguments.get("group_query_attention"):
        options["num_query_groups"] = None
    if "untie_embeddings_and_output_weights" in arguments:
        options["share_embeddings_and_output_weights"] = not arguments["untie_embeddings_and_output_weights"]
    options["vocab_size"] = arguments.get("vocab_size") or arguments.get("padded_vocab_size")
    return options


def _check(options: Mapping[str, Any], supported: Mapping[str, tuple[Any, ...]], place: str) -> None:
    for option, values in supported.items():
        if option in options and options[option] not in values:
            expected = " or ".join(map(repr, values))
            raise CheckpointError(f"{place}: {option} is {options[option]!r}, expected {expected}")


def _size(options: Mapping[str, Any], option: str, place: str) -> int:
    value = options.get(option)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CheckpointError(f"{place}: {option} is {value!r}, expected a positive integer")
    return value


def _number(options: Mapping[str, Any], option: str, default: float, place: str) -> float:
    value = options.get(option)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise CheckpointError(f"{place}: {option} is {value!r}, expected a positive number")
    return float(value)
