"""The options that decide what a model computes, compared between a checkpoint and the model that is to load it.

Shapes do not tell these: with another rotary base, epsilon or gate a checkpoint loads without a word, and trains wrongly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from nemo_skymoe.architecture import Architecture, layer_pattern
from nemo_skymoe.checkpoint import rope, yarn
from nemo_skymoe.checkpoint.description import Description
from nemo_skymoe.checkpoint.torch_dist.model_options import llama_options, model_options
from nemo_skymoe.checkpoint.torch_dist.options import SUPPORTED, SUPPORTED_MOE
from nemo_skymoe.durable.errors import ConfigurationError
from nemo_skymoe.names import unknown
from nemo_skymoe.rotary_options import RotaryOptions

CHANGES = "differs_from_checkpoint"
"""The option with the names of those that are another on purpose."""
_EVERY_OPTION = Architecture(2, 8, 8, 2, 8, num_moe_experts=2, moe_layer_freq=(0, 1))
_OTHERWISE_CHECKED = ("vocab_size", "seq_length")
"""The vocabulary is the tokenizer's, and is compared with the rows of the embedding; any length is right for RoPE."""
DECIDING: dict[str, Any] = {
    "num_moe_experts": None,
    **dict.fromkeys([*model_options(Description(_EVERY_OPTION), 8), *llama_options()]),
    **{field.name: field.default for field in fields(RotaryOptions)},
    **{option: values[0] for option, values in (SUPPORTED | SUPPORTED_MOE).items()},
    "moe_router_logit_norm_correction": 1,
    "moe_router_logit_norm_eps": 1e-6,
}
"""The options by name, with the value that one has where it is not there: every option of a description, and all that a
Llama or a Skywork-MoE has one value of."""
for _option in _OTHERWISE_CHECKED:
    del DECIDING[_option]


@dataclass(frozen=True)
class Difference:
    """An option that has another value in the checkpoint than in the model that is to load it."""

    option: str
    wanted: Any
    saved: Any


def options_of(config: Any) -> dict[str, Any]:
    """Return the deciding options of a configuration object, of NeMo's, Bridge's or Megatron's."""
    return {option: getattr(config, option) for option in DECIDING if hasattr(config, option)}


def differences(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[Difference]:
    """Return every deciding option in which two models differ.

    Args:
        saved: The options that a checkpoint keeps, by Megatron's names. More may be there.
        wanted: Those of the model that is to load it.

    Raises:
        ConfigurationError: One of them has a `moe_layer_freq` that is none.
    """
    ours, theirs = _settled(wanted), _settled(saved)
    both = [option for option in DECIDING if option in ours and option in theirs]
    return [
        Difference(_spelling(option, wanted), ours[option], theirs[option])
        for option in both
        if (ours[option] or None) != (theirs[option] or None)  # False, 0 and None turn an option off
    ]


def check_deciding(
    saved: Mapping[str, Any],
    wanted: Mapping[str, Any],
    changes: object,
    checkpoint: object,
    spelled: Callable[[str], str] = str,
) -> None:
    """Refuse a checkpoint of another model.

    Args:
        saved: The options that the checkpoint keeps.
        wanted: Those of the model that is to load it.
        changes: The names of the options that are another on purpose, or None.
        checkpoint: The folder.
        spelled: Returns what a user writes for an option of Megatron's name, such as "model.config.rotary_base".

    Raises:
        ConfigurationError: They differ, and the message has every difference; or `changes` is no list of deciding
            options.
    """
    kept = _names(changes, spelled(CHANGES))
    said = [
        f"{spelled(each.option)} is {_shown(each.wanted)}, expected {_shown(each.saved)}"
        for each in differences(saved, wanted)
        if each.option not in kept
    ]
    if said:
        raise ConfigurationError(
            f"the checkpoint '{checkpoint}' is of another model: {'; '.join(said)}; an option that is to be another"
            f" on purpose belongs in {spelled(CHANGES)}"
        )


def _names(changes: object, option: str) -> list[str]:
    if changes is None:
        return []
    if not isinstance(changes, list | tuple):
        raise ConfigurationError(
            f"{option} is {changes!r}, expected a list of options, such as [rotary_base]"
        )
    for name in changes:
        if name not in DECIDING:
            raise unknown(option, str(name), DECIDING)
    return [*changes]


def _settled(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that have an effect, each spelled in one way, with what follows from others filled in."""
    found = {option: _plain(options.get(option, default)) for option, default in DECIDING.items()}
    heads, hidden = found["num_attention_heads"], found["hidden_size"]
    found["num_query_groups"] = found["num_query_groups"] or heads
    if heads and hidden:
        found["kv_channels"] = found["kv_channels"] or hidden // heads
        found["ffn_hidden_size"] = found["ffn_hidden_size"] or 4 * hidden
    rotary = rope.megatron_options(rope.scaling_of(options))  # NeMo's Llama has other names for the same
    found = {option: value for option, value in found.items() if not option.startswith(("rope_", "yarn_"))}
    found |= {yarn.FACTOR: 1.0, **rotary}
    if found["position_embedding_type"] == "yarn":  # another spelling of the same embedding
        found["position_embedding_type"] = "rope"
    if not found["num_moe_experts"]:
        return {option: value for option, value in found.items() if not option.startswith("moe_")}
    found["moe_ffn_hidden_size"] = found["moe_ffn_hidden_size"] or found["ffn_hidden_size"]
    found["moe_layer_freq"] = layer_pattern(found["moe_layer_freq"] or 1, found["num_layers"] or 1)
    if all(found["moe_layer_freq"]):
        found["moe_layer_freq"] = 1
        del found["ffn_hidden_size"]
    if found["moe_router_logit_norm_scale"] is None:
        del found["moe_router_logit_norm_correction"], found["moe_router_logit_norm_eps"]
    return found


def _plain(value: Any) -> Any:
    """Return a value as it is compared: a function by its name, and a list as a tuple."""
    if isinstance(value, list | tuple):
        return tuple(value)
    if callable(value):
        return getattr(value, "__name__", str(value))
    if isinstance(value, str) and value.startswith("torch."):
        return value.rpartition(".")[2]
    return value


def _spelling(option: str, wanted: Mapping[str, Any]) -> str:
    """Return the option that sets a size of experts, which is that of the MLPs where they have none of their own."""
    shared = option == "moe_ffn_hidden_size" and not wanted.get(option)
    return "ffn_hidden_size" if shared else option


def _shown(value: Any) -> str:
    return repr([*value] if isinstance(value, tuple) else value)
