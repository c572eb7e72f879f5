"""YaRN (arXiv 2309.00071): Hugging Face's fields, and Megatron's options for the same function."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from nemo_skymoe.durable.errors import ConfigurationError
from nemo_skymoe.rotary_options import RotaryOptions, concentration_factor

FACTOR = "yarn_rotary_scaling_factor"
_NUMBERS = {
    "factor": FACTOR,
    "original_max_position_embeddings": "yarn_original_max_position_embeddings",
    "beta_fast": "yarn_beta_fast",
    "beta_slow": "yarn_beta_slow",
}
_MSCALE = {name: getattr(RotaryOptions, name) for name in ("yarn_mscale", "yarn_mscale_all_dim")}
_ROUND = "yarn_correction_range_round_to_int"
_NAMES = ("rope_type", "type", "rope_theta", "partial_rotary_factor", "finetuned")
"""Fields that were read before, or say nothing about the function."""
_FIELDS = {*_NUMBERS, *_NAMES, "truncate", "mscale", "mscale_all_dim", "attention_factor"}


def megatron_options(scaling: Mapping[str, Any]) -> dict[str, Any]:
    """Return Megatron's options of a scaling in Hugging Face's form, which says its original length.

    Raises:
        ConfigurationError: A field is missing, wrong, or unknown.
    """
    for field, value in scaling.items():
        if field not in _FIELDS and value is not None:
            raise ConfigurationError(f"rope_scaling: {field} is {value!r}, expected no such field in YaRN")
    options: dict[str, Any] = {
        option: positive(scaling, field, None if field == "factor" else getattr(RotaryOptions, option))
        for field, option in _NUMBERS.items()
    }
    options["yarn_original_max_position_embeddings"] = int(options["yarn_original_max_position_embeddings"])
    factor, fast, slow = (options[_NUMBERS[field]] for field in ("factor", "beta_fast", "beta_slow"))
    if factor < 1:
        raise ConfigurationError(f"rope_scaling: factor is {factor:g}, expected at least 1")
    if slow >= fast:
        raise ConfigurationError(
            f"rope_scaling: beta_slow is {slow:g}, expected less than beta_fast ({fast:g})"
        )
    truncate = scaling.get("truncate", True)
    if not isinstance(truncate, bool):
        raise ConfigurationError(f"rope_scaling: truncate is {truncate!r}, expected true or false")
    mscale = _mscale(factor, _attention_factor(scaling, factor))
    return options | {"yarn_mscale": mscale, "yarn_mscale_all_dim": 0.0, _ROUND: truncate}


def scaling_of(options: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the scaling, in Hugging Face's form, of a model with these options; None if they scale nothing.

    One function has one form: `attention_factor` says what the two `mscale` come to.

    Raises:
        ConfigurationError: A value cannot work.
    """
    values: dict[str, Any] = {
        field: positive(options, option, getattr(RotaryOptions, option)) for field, option in _NUMBERS.items()
    }
    factor = values["factor"]
    if factor == 1:
        return None
    values["original_max_position_embeddings"] = int(values["original_max_position_embeddings"])
    weights = [options.get(name, default) for name, default in _MSCALE.items()]
    if None in weights:  # Megatron takes no notice of the other then
        weights = [*_MSCALE.values()]
    found = concentration_factor(factor, *(_finite(weight, "yarn_mscale") for weight in weights))
    if found != concentration_factor(factor, *_MSCALE.values()):
        values["attention_factor"] = found
    if options.get(_ROUND) is False:
        values["truncate"] = False
    return {"rope_type": "yarn", **values}


def _attention_factor(scaling: Mapping[str, Any], factor: float) -> float:
    """Return the number that sine and cosine are multiplied by, as transformers finds it from the optional fields."""
    if scaling.get("attention_factor") is not None:
        return positive(scaling, "attention_factor")
    weights = [scaling.get(name) for name in ("mscale", "mscale_all_dim")]
    if not all(weights):  # transformers takes no notice of one without the other
        weights = [*_MSCALE.values()]
    return concentration_factor(factor, *(_finite(weight, "mscale") for weight in weights))


def _mscale(factor: float, wanted: float) -> float:
    """Return the `yarn_mscale` with which Megatron multiplies sine and cosine by exactly this number."""
    guess = (wanted - 1.0) / (0.1 * math.log(factor)) if factor > 1 else 0.0
    near = [guess]
    for end in (-math.inf, math.inf):
        neighbour = guess
        for _ in range(4):
            neighbour = math.nextafter(neighbour, end)
            near.append(neighbour)
    for mscale in (RotaryOptions.yarn_mscale, round(guess, 12), *near):
        if concentration_factor(factor, mscale, 0.0) == wanted:
            return mscale
    raise ConfigurationError(
        f"rope_scaling: attention_factor is {wanted!r}, expected a number that Megatron reaches as 1 + 0.1 yarn_mscale"
        f" ln({factor:g})"
    )


def _finite(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigurationError(f"rope_scaling: {name} is {value!r}, expected a number")
    return float(value)


def positive(values: Mapping[str, Any], name: str, default: float | None = None) -> float:
    """Return a positive number of a scaling.

    Raises:
        ConfigurationError: It is none.
    """
    value = default if values.get(name) is None else values[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ConfigurationError(f"rope_scaling: {name} is {value!r}, expected a positive number")
    return float(value)
