"""What is said about a recipe of Megatron-Bridge on a command line: `KEY=VALUE` for its arguments and for Bridge's options."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from nemo_skymoe import credentials
from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.experiments import catalogue
from nemo_skymoe.experiments.arguments import check_renamed
from nemo_skymoe.names import unknown
from nemo_skymoe.typed import checked, kinds

SECTIONS = (
    *("train", "validation", "model", "optimizer", "optimizer_config_override_provider", "scheduler", "ddp"),
    *("dataset", "tokenizer", "logger", "checkpoint", "rng", "dist", "mixed_precision", "comm_overlap", "peft"),
    *("profiling", "ft", "straggler", "nvrx_straggler", "rerun_state_machine", "inprocess_restart", "tensor_inspect"),
    "env_vars",
)  # fmt: skip
"""The options of Bridge's `ConfigContainer`. Whatever else has no dot is an argument of the recipe."""


def split(recipe: str, words: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Return a recipe's arguments by name, and what is left for Bridge, among words of a command line.

    The value of an argument is what follows the first `=`, as it is; `null` is None. Bridge's options have a dot, such as
    `train.train_iters=100`, and their values are read as Bridge reads them, by hydra's grammar.

    Args:
        recipe: Full or short name of the recipe.
        words: Words of the form KEY=VALUE.

    Raises:
        ConfigurationError: The recipe, an argument or Bridge's section is unknown, a word has no value, a value has
            another type or looks like a secret, or an argument is given twice.
    """
    signature = inspect.signature(catalogue.RECIPES[catalogue.full_name(recipe)])
    arguments: dict[str, Any] = {}
    overrides = []
    for word in words:
        key, sign, value = word.partition("=")
        credentials.check_text(key, word)
        credentials.check_text(key, value)
        if not sign or not key:
            raise ConfigurationError(f"{word!r} is no option, expected KEY=VALUE")
        check_renamed([key])
        if key in signature.parameters:
            if key in arguments:
                raise ConfigurationError(f"{key} is given twice, expected one value")
            arguments[key] = _read(key, signature.parameters[key].annotation, value)
        elif key.lstrip("+~").partition(".")[0] in SECTIONS:
            overrides.append(word)
        else:
            raise unknown("option", key, [*signature.parameters, *SECTIONS])
    return arguments, overrides


def checked_arguments(recipe: str, arguments: Mapping[str, Any], section: str = "") -> dict[str, Any]:
    """Return a recipe's arguments as their types demand. `section` stands before names, such as "training.".

    Raises:
        ConfigurationError: An argument is unknown or has another type.
    """
    parameters = inspect.signature(catalogue.RECIPES[catalogue.full_name(recipe)]).parameters
    for name in arguments:
        if name not in parameters:
            raise unknown("option", f"{section}{name}", [f"{section}{each}" for each in parameters])
    return {
        name: checked(f"{section}{name}", parameters[name].annotation, value)
        for name, value in arguments.items()
    }


def spoken(arguments: Mapping[str, Any]) -> list[str]:
    """Return the words by which `split` reads these arguments of a recipe."""
    return [f"{name}={_text(value)}" for name, value in arguments.items()]


def _read(name: str, hint: Any, text: str) -> Any:
    if text == "null":
        value: Any = None
    elif str in kinds(hint):
        value = text
    else:
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            value = text
    return checked(name, hint, value)


def _text(value: Any) -> str:
    if value is None:
        return "null"
    return value if isinstance(value, str) else repr(value)
