"""Check that values that a user gives have the types of what they are for."""

import inspect
from collections.abc import Callable
from typing import Any, get_args, get_type_hints

from nemo_skymoe.config import ConfigurationError


def kinds(hint: Any) -> set[Any]:
    """Return the types of an annotation."""
    return {hint, *get_args(hint)}


def hints_of(function: Callable[..., Any]) -> dict[str, Any]:
    """Return the types of a function's arguments, or of a class's; none if only a type checker can read them."""
    target = function.__init__ if inspect.isclass(function) else function
    try:
        return get_type_hints(target)
    except (NameError, TypeError):  # annotations of other packages that only their type checker can read
        return {}


def checked(name: str, hint: Any, value: Any) -> Any:
    """Return `value` as `hint` demands, if that is made of plain types.

    Raises:
        ConfigurationError: It has another type. The message names it.
    """
    from pydantic import TypeAdapter, ValidationError
    from pydantic.errors import PydanticUserError

    if hint is None:
        return value
    if isinstance(value, bool) and {int, float} & kinds(hint) and bool not in kinds(hint):
        raise ConfigurationError(f"{name} is {value!r}, expected a number")  # which Python takes for 0 or 1
    try:
        adapter = TypeAdapter(hint)
    except (PydanticUserError, TypeError):
        return value
    try:
        return adapter.validate_python(value)
    except ValidationError:
        expected = (
            getattr(hint, "__name__", None) if inspect.isclass(hint) else str(hint).replace("typing.", "")
        )
        raise ConfigurationError(f"{name} is {value!r}, expected {expected}") from None
