"""The names that patches replace upstream. A patch whose target is not there would act on nothing, without a word."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nemo_skymoe.config import ConfigurationError


class MissingTarget(ConfigurationError):
    """Upstream has no such name, so that a patch cannot act. The message says where the name was expected."""


def replace(owner: Any, names: str | Sequence[str], stand_in: Any) -> None:
    """Replace an attribute of a module or a class.

    Args:
        owner: The module or class.
        names: The attribute's name, or its names in different versions. Every one that is there is replaced.
        stand_in: What takes its place.

    Raises:
        MissingTarget: `owner` has none of the names.
    """
    expected = [names] if isinstance(names, str) else list(names)
    found = [name for name in expected if hasattr(owner, name)]
    if not found:
        raise MissingTarget(
            f"{_path(owner)} has no {' or '.join(expected)}, which a patch of nemo_skymoe replaces: expected a version"
            " that `skymoe doctor` calls supported"
        )
    for name in found:
        setattr(owner, name, stand_in)


def apply_rest(substitutions: Mapping[str, Callable[[], None]], applied: list[str]) -> None:
    """Apply the substitutions whose names are not in `applied` yet, and add them to it.

    One that cannot act raises, and raises again at the next call: it is never taken for applied.
    """
    for name, substitute in substitutions.items():
        if name not in applied:
            substitute()
            applied.append(name)


def _path(owner: Any) -> str:
    module = getattr(owner, "__module__", None)
    return f"{module}.{owner.__qualname__}" if module else owner.__name__
