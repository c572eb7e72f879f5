"""Refuse unknown names, and propose the nearest known one."""

from collections.abc import Iterable
from difflib import SequenceMatcher

from nemo_skymoe.config import ConfigurationError

_SHOWN = 12
_NEAR, _ALIKE = 0.5, 0.8


def unknown(what: str, name: str, known: Iterable[str]) -> ConfigurationError:
    """Return the error for an unknown name of a `what`, with the nearest of `known`, or all of a short list.

    Names with dots are options of parts. Their last word counts first: the nearest to `training.max_step` is
    `training.trainer.max_steps`, not `training.max_lr`.
    """
    names = sorted(known)
    near = max(names, key=lambda each: _nearness(name, each), default="")
    word, _, whole = _nearness(name, near)
    if max(word, whole) >= _NEAR:
        hint = f"did you mean {near}?"
    else:
        hint = f"expected one of {', '.join(names[:_SHOWN])}{', ...' if len(names) > _SHOWN else ''}"
    return ConfigurationError(f"{what} {name} is unknown: {hint}")


def _nearness(name: str, other: str) -> tuple[float, int, float]:
    (*path, last), (*there, end) = name.split("."), other.split(".")
    word = _ratio(last, end) if path else 0.0
    return (word if word >= _ALIKE else 0.0, len({*path} & {*there}), _ratio(name, other))


def _ratio(name: str, other: str) -> float:
    return SequenceMatcher(None, name, other).ratio()
