"""Set options of Bridge's configuration by `SECTION.OPTION=VALUE`, and refuse what Bridge would let pass.

Bridge ignores names that it does not know and options that are taken away, and gives an option whatever value it gets.
"""

import dataclasses
import enum
from collections.abc import Iterator, Sequence
from typing import Any, get_type_hints

import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from megatron.bridge.training.config import ConfigContainer
from megatron.bridge.training.utils.omegaconf_utils import OverridesError, process_config_with_overrides

from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.names import unknown
from nemo_skymoe.typed import checked


def set_options(config: ConfigContainer, overrides: Sequence[str]) -> None:
    """Set options in hydra's grammar, as Bridge's own scripts take them.

    Raises:
        ConfigurationError: A word cannot be read, its option does not exist or cannot be set like this, or its value
            has another type.
    """
    for override in _parsed(overrides):
        _check(config, override)
    try:
        process_config_with_overrides(config, cli_overrides=list(overrides))
    except OverridesError as refused:
        raise ConfigurationError(" ".join(str(refused).split())) from None


def _parsed(overrides: Sequence[str]) -> list[Override]:
    parser = OverridesParser.create()
    parsed = []
    for word in overrides:
        try:
            parsed += parser.parse_overrides([word])
        except HydraException:
            raise ConfigurationError(
                f"{word!r} cannot be read, expected OPTION=VALUE by hydra's grammar: quote a value like 'this'"
            ) from None
    return parsed


def _check(config: ConfigContainer, override: Override) -> None:
    word, name = str(override.input_line), override.key_or_group
    if override.type is not OverrideType.CHANGE:
        raise ConfigurationError(
            f"{word!r} adds or removes an option, expected one that exists: OPTION=VALUE"
        )
    if override.is_sweep_override():
        raise ConfigurationError(
            f"{word!r} is a sweep, expected one value: quote a value with commas like 'this'"
        )
    if "${" in word:
        raise ConfigurationError(f"{word!r} refers to another option, expected a plain value")
    *path, last = name.split(".")
    part: Any = config
    for step in path:
        if isinstance(part, dict):
            return  # free names, such as env_vars
        part = getattr(part, step, None) if _has(part, step) else None
        if part is None:
            raise unknown("option", name, _names(config))
    if isinstance(part, dict):
        return
    if not _has(part, last):
        raise unknown("option", name, _names(config))
    _check_value(name, part, last, override.value())


def _check_value(name: str, part: Any, option: str, value: Any) -> None:
    now = getattr(part, option)
    if isinstance(now, torch.dtype | enum.Enum):
        return  # Bridge reads their names
    if callable(now) and not isinstance(now, type):
        raise ConfigurationError(f"{name} is a function, expected an option with a plain value")
    try:
        hint = get_type_hints(type(part)).get(option)
    except (NameError, TypeError):  # annotations that only a type checker can read
        return
    checked(name, hint, value)


def _has(part: Any, name: str) -> bool:
    return dataclasses.is_dataclass(part) and any(field.name == name for field in dataclasses.fields(part))


def _names(part: Any, path: str = "") -> Iterator[str]:
    """Yield the names of all options."""
    for field in dataclasses.fields(part):
        value = getattr(part, field.name, None)
        if field.name.startswith("_"):
            continue
        if dataclasses.is_dataclass(value):
            yield from _names(value, f"{path}{field.name}.")
        else:
            yield f"{path}{field.name}"
