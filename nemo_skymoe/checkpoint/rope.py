"""The scaling of the rotary embedding: Hugging Face's fields, and Megatron's options for the same function."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemo_skymoe.checkpoint import yarn
from nemo_skymoe.checkpoint.yarn import positive
from nemo_skymoe.durable.errors import ConfigurationError

_LLAMA3 = {
    "factor": ("rope_scaling_factor", "scale_factor"),
    "low_freq_factor": ("rope_scaling_low_freq_factor", "low_freq_factor"),
    "high_freq_factor": ("rope_scaling_high_freq_factor", "high_freq_factor"),
    "original_max_position_embeddings": (
        "rope_scaling_original_max_position_embeddings",
        "old_context_len",
    ),
}
"""Llama 3.1's fields, our options, and the names that NeMo's `Llama31Config` has for them. Megatron has the factor alone."""
_DEFAULTS = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""The values that Megatron's rotary embedding and NeMo's `Llama31Config` have where nobody sets others."""


def megatron_options(scaling: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return Megatron's options, and ours beside them, of a scaling in Hugging Face's form.

    Args:
        scaling: Hugging Face's `rope_scaling` with a `rope_type`; None for none.

    Raises:
        ConfigurationError: It is of a type that the models here do not have in Megatron, or a field is missing or wrong.
    """
    options: dict[str, Any] = {"seq_len_interpolation_factor": None, "rope_scaling": False}
    if scaling is None:
        return options
    kind = scaling.get("rope_type")
    if kind == "linear":
        return options | {"seq_len_interpolation_factor": positive(scaling, "factor")}
    if kind == "llama3":
        values = {ours: positive(scaling, field) for field, (ours, _) in _LLAMA3.items()}
        length = "rope_scaling_original_max_position_embeddings"
        low, high = (values[f"rope_scaling_{end}_freq_factor"] for end in ("low", "high"))
        if low >= high:
            raise ConfigurationError(
                f"rope_scaling: low_freq_factor is {low:g}, expected less than high_freq_factor ({high:g})"
            )
        return options | values | {length: int(values[length]), "rope_scaling": True}
    if kind == "yarn":
        return options | yarn.megatron_options(scaling)
    raise ConfigurationError(
        f"rope_scaling is of type {kind!r}, which Megatron lacks; expected 'linear', 'llama3', 'yarn', 'ntk' or none"
    )


def canonical(scaling: Mapping[str, Any], length: int) -> dict[str, Any] | None:
    """Return a scaling as `scaling_of` does, so that one function has one form; one that Megatron lacks as it is.

    Args:
        scaling: Hugging Face's `rope_scaling` with a `rope_type`.
        length: `max_position_embeddings`, which is YaRN's original length where the scaling says none.
    """
    if scaling.get("rope_type") != "yarn":
        return {**scaling}
    said = scaling.get("original_max_position_embeddings") or length
    complete = {**scaling, "original_max_position_embeddings": said}
    try:
        return yarn.scaling_of(yarn.megatron_options(complete))
    except ConfigurationError:
        return complete


def scaling_of(options: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the scaling, in Hugging Face's form, of a model with these options of Megatron, NeMo or Bridge.

    Raises:
        ConfigurationError: A value is no positive number.
    """
    if options.get("rope_scaling") or options.get("scale_factor") is not None:
        number = 0 if options.get("rope_scaling") else 1
        values = {
            field: positive(options, names[number], _DEFAULTS[field]) for field, names in _LLAMA3.items()
        }
        length = int(values["original_max_position_embeddings"])
        return {"rope_type": "llama3", **values, "original_max_position_embeddings": length}
    if (interpolated := yarn.scaling_of(options)) is not None:
        return interpolated
    factor = positive(options, "seq_len_interpolation_factor", 1.0)
    return None if factor == 1.0 else {"rope_type": "linear", "factor": factor}
