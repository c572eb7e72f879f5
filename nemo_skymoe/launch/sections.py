"""Put a section of a composed configuration on what a Python factory makes. Nothing else connects the two."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import fiddle as fdl

from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.names import unknown
from nemo_skymoe.nemo.options import options, parameters
from nemo_skymoe.typed import checked, hints_of, kinds

MISSING = "???"
"""Hydra's mark of a value that has to be given."""


def configure(section: str, factory: Callable[..., Any], values: Mapping[str, Any]) -> Any:
    """Call `factory` with the values that are its arguments, and set the others on what it returns.

    Args:
        section: Name of the section in messages.
        factory: A function that returns a Fiddle configuration.
        values: Values by name. Nested ones go into the parts, as in `{"trainer": {"max_steps": 10}}`.

    Raises:
        ConfigurationError: Neither has a name, and the message proposes the nearest one; or a value is missing or has
            another type.
    """
    check_missing(section, values)
    parameters, hints = inspect.signature(factory).parameters, hints_of(factory)
    arguments = {name: value for name, value in values.items() if name in parameters}
    made = factory(
        **{name: checked(f"{section}.{name}", hints.get(name), value) for name, value in arguments.items()}
    )
    also = {f"{section}.{name}" for name in parameters}
    set_values(section, made, {k: v for k, v in values.items() if k not in parameters}, also)
    return made


def set_values(section: str, made: Any, values: Mapping[str, Any], also: Iterable[str] = ()) -> None:
    """Set `values` on a Fiddle configuration, and mappings on its parts. `also` names further options that exist."""
    known, also = parameters(made), {*options(section, made), *also}
    hints = hints_of(made.__fn_or_cls__)
    for name, value in values.items():
        if name not in known:
            raise unknown("option", f"{section}.{name}", also)
        part = fdl.ordered_arguments(made).get(name)
        if isinstance(part, fdl.Buildable) and isinstance(value, Mapping):
            set_values(f"{section}.{name}", part, value, also)
        elif isinstance(part, fdl.Buildable) and not _replaces(hints.get(name), value):
            raise ConfigurationError(
                f"{section}.{name} is {value!r}, expected its options, such as"
                f" {section}.{name}.{min(parameters(part))}=VALUE"
            )
        else:
            setattr(made, name, checked(f"{section}.{name}", hints.get(name), value))


def check_unplanned(section: str, values: Mapping[str, Any]) -> None:
    """Refuse stages that are given beside the job that plans them.

    Raises:
        ConfigurationError: The message names the option.
    """
    for name in (
        "pipeline_layout",
        "pipeline_recompute",
        "plan",
        "pipeline_model_parallel_layout",
        "pipeline_plan",
    ):
        if values.get(name) is not None:
            raise ConfigurationError(
                f"{section}.{name} is {values[name]!r} and jobs has plan, expected one of them"
            )


def _replaces(hint: Any, value: Any) -> bool:
    """Say whether a plain value may replace a factory's part: None if it is optional, a name if names are allowed."""
    return type(value) in kinds(hint)


def check_missing(section: str, value: Any) -> None:
    """Refuse a value that YAML marks as missing, anywhere in the section."""
    if isinstance(value, Mapping):
        for name, part in value.items():
            check_missing(f"{section}.{name}", part)
    elif isinstance(value, list):
        for part in value:
            check_missing(section, part)
    elif value == MISSING:
        raise ConfigurationError(f"{section} is missing, expected {section}=VALUE")
