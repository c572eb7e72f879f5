"""Find single values of options that cannot work, and describe the first of them in one sentence.

Megatron accepts most bad values silently, or answers them with a traceback once it trains.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import fields
from numbers import Integral, Real
from types import UnionType
from typing import Any, Union, get_args, get_origin

Rule = tuple[str, str, Callable[[Any], bool]]
"""An option, a description of its valid values, and a function that says whether a value is one of them."""

_BALANCING = ("aux_loss", "seq_aux_loss", "global_aux_loss", "none", "sinkhorn")
_NAMES = {bool: "True or False", int: "a whole number", float: "a number", str: "a name"}


def wrong_type(config: Any, options: type) -> str | None:
    """Return what is wrong with the type of an option, or None.

    The options of the class `options` are checked strictly. Of all others, only text in place of a number or a truth
    value is refused: a command line may pass text on, and `"false"` would be true.
    """
    strict = {field.name for field in fields(options)}
    for field in fields(config):
        wanted, optional = _wanted(field.type)
        value = getattr(config, field.name, None)
        if wanted is None or (value is None and (optional or field.name not in strict)):
            continue
        if is_a(value, wanted) or (field.name not in strict and not isinstance(value, str)):
            continue
        if wanted is not str:
            return f"{field.name} is {value!r}, expected {_NAMES[wanted]}"
        if field.name in strict:
            return f"{field.name} is {value!r}, expected {_NAMES[str]}"
    return None


def wrong_size(config: Any) -> str | None:
    """Return what is wrong with a size that layers or process groups are made by, or None."""
    return _first(config, _SIZES)


def wrong_moe_value(config: Any) -> str | None:
    """Return what is wrong with the value of an option of Megatron's MoE, or None."""
    return _first(config, _MOE) or _wrong_balancing(config) or _wrong_layers(config)


def is_a(value: Any, kind: type) -> bool:
    """Say whether a value is of this type. A truth value is not a number, but a whole number is a float."""
    if kind is bool or isinstance(value, bool):
        return kind is bool and isinstance(value, bool)
    return isinstance(value, {int: Integral, float: Real}.get(kind, kind))


def _wanted(annotation: Any) -> tuple[type | None, bool]:
    """Return the one simple type of an annotation, or None if it has another or several, and whether it allows None."""
    kinds = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    named = [kind for kind in kinds if kind is not type(None)]
    simple = named[0] if len(named) == 1 and named[0] in _NAMES else None
    return simple, len(named) < len(kinds)


def _first(config: Any, rules: tuple[Rule, ...]) -> str | None:
    for option, expected, fits in rules:
        if hasattr(config, option) and not fits(getattr(config, option)):
            return f"{option} is {getattr(config, option)!r}, expected {expected}"
    return None


def _wrong_balancing(config: Any) -> str | None:
    kinds, coefficients = config.moe_router_load_balancing_type, config.moe_aux_loss_coeff
    several = isinstance(kinds, list)
    names = kinds if several else [kinds]
    if not names or any(name not in _BALANCING for name in names) or len(set(names)) < len(names):
        return (
            f"moe_router_load_balancing_type is {kinds!r}, expected one of {', '.join(_BALANCING[:4])}, or a list of"
            " different ones"
        )
    if several != isinstance(coefficients, list) or (several and len(coefficients) != len(kinds)):
        expected = f"a list of {len(names)} of them" if several else "a number"
        return (
            f"moe_aux_loss_coeff is {coefficients!r}, expected {expected} with"
            f" moe_router_load_balancing_type={kinds!r}"
        )
    if not all(_not_negative(value) for value in (coefficients if several else [coefficients])):
        return f"moe_aux_loss_coeff is {coefficients!r}, expected finite numbers of at least 0"
    return None


def _wrong_layers(config: Any) -> str | None:
    pattern, layers = config.moe_layer_freq, config.num_layers
    if _positive_integer(pattern):
        return None
    if not isinstance(pattern, list) or any(not is_a(one, int) or one not in (0, 1) for one in pattern):
        return (
            f"moe_layer_freq is {pattern!r}, expected n for an MoE in every n-th layer, or a list with 1 for every"
            " MoE layer and 0 for every dense one"
        )
    if len(pattern) != layers or not any(pattern):
        return (
            f"moe_layer_freq has {len(pattern)} entries, {sum(pattern)} of them 1; expected num_layers = {layers}"
            " entries and an MoE layer among them"
        )
    return None


def finite(value: Any) -> bool:
    """Say whether a value is a finite number."""
    return is_a(value, float) and math.isfinite(value)


def _positive(value: Any) -> bool:
    return finite(value) and value > 0


def _not_negative(value: Any) -> bool:
    return finite(value) and value >= 0


def _positive_integer(value: Any) -> bool:
    return is_a(value, int) and value >= 1


def _or_none(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or fits(value)


def _one_of(*choices: Any) -> Callable[[Any], bool]:
    return lambda value: value in choices


def _sizes(names: tuple[str, ...], optional: bool) -> Iterator[Rule]:
    expected = "a whole number above 0" + (", or None" if optional else "")
    fits = _or_none(_positive_integer) if optional else _positive_integer
    return ((name, expected, fits) for name in names)


_GROUPS = ("tensor_model", "pipeline_model", "context", "expert_model")
_SIZES: tuple[Rule, ...] = (
    *_sizes(("num_layers", "hidden_size", "num_attention_heads"), optional=False),
    *_sizes(tuple(f"{group}_parallel_size" for group in _GROUPS), optional=False),
    *_sizes(("expert_tensor_parallel_size", "virtual_pipeline_model_parallel_size"), optional=True),
    *_sizes(("ffn_hidden_size", "kv_channels", "num_query_groups", "vocab_size"), optional=True),
)
_MOE: tuple[Rule, ...] = (
    *_sizes(("num_moe_experts", "moe_router_topk"), optional=False),
    *_sizes(("moe_ffn_hidden_size", "moe_shared_expert_intermediate_size"), optional=True),
    ("moe_z_loss_coeff", "None or a finite number of at least 0", _or_none(_not_negative)),
    (
        "moe_input_jitter_eps",
        "None or a number between 0 and 1",
        _or_none(lambda value: _positive(value) and value < 1),
    ),
    ("moe_router_topk_scaling_factor", "None or a finite number above 0", _or_none(_positive)),
    (
        "moe_expert_capacity_factor",
        "None or a finite number above 0",
        # A negative factor is Megatron's other way to say None.
        _or_none(lambda value: finite(value) and value != 0),
    ),
    ("moe_token_drop_policy", "'probs' or 'position'", _one_of("probs", "position")),
    ("moe_router_dtype", "None, 'fp32' or 'fp64'", _one_of(None, "fp32", "fp64")),
    (
        "moe_token_dispatcher_type",
        "'allgather', 'alltoall' or 'flex'",
        _one_of("allgather", "alltoall", "flex"),
    ),
)
