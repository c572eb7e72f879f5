"""The options of a Fiddle configuration and of its parts, which overrides can name."""

import inspect
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import fiddle as fdl

from nemo_skymoe import credentials
from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.names import unknown


def parameters(made: Any) -> set[str]:
    """Return the names of the parameters of the function or class that `made` calls."""
    signature = inspect.signature(made.__fn_or_cls__).parameters
    return {name for name, parameter in signature.items() if parameter.kind is not parameter.VAR_KEYWORD}


def options(section: str, made: Any) -> Iterator[str]:
    """Yield every option of `made` and its parts, such as `training.trainer.max_steps`. An empty section has no dot."""
    for name in parameters(made):
        option = f"{section}.{name}" if section else name
        yield option
        if isinstance(part := fdl.ordered_arguments(made).get(name), fdl.Buildable):
            yield from options(option, part)


def check_overrides(made: Any, overrides: Sequence[str]) -> None:
    """Refuse overrides of NeMo-Run's, such as `trainer.max_step=3`, that name no option of `made`.

    An option of a part that another override replaces is left to NeMo-Run.

    Raises:
        ConfigurationError: An option does not exist. The message proposes the nearest one.
    """
    keys = [override.partition("=")[0].rstrip("+-*/|&") for override in overrides if "=" in override]
    for key in keys:
        if not any(key.startswith(f"{other}.") for other in keys) and not _has(made, key.split(".")):
            raise unknown("option", key, options("", made))


def refuse_secrets(arguments: Sequence[str]) -> None:
    """End the process if an argument of `nemo` holds a secret: the traceback of an exception could show it."""
    for argument in arguments:
        option, _, value = argument.partition("=")
        try:
            credentials.check_text(option, argument)
            credentials.check_text(option, value)
        except ConfigurationError as refused:
            sys.exit(f"nemo: {refused}")


def _has(made: Any, path: Sequence[str]) -> bool:
    if not isinstance(made, fdl.Buildable):
        return True  # a value: what is in it is not known here
    name, *rest = path
    signature = inspect.signature(made.__fn_or_cls__).parameters.values()
    if name not in parameters(made):
        return any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature)
    return not rest or _has(fdl.ordered_arguments(made).get(name), rest)
