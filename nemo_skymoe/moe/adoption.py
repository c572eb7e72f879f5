"""This is the only place that changes the class of an object. Megatron offers no argument for what is needed here.

Building a second router would draw from the random number generator again and change every later initial weight;
building a second stock dispatcher would need arguments that Megatron's versions name differently.
"""

from typing import Any, TypeVar, cast

T = TypeVar("T")


def adopt(built: Any, cls: type[T]) -> T:
    """Return the same object with the class `cls`, a subclass of its class that adds no state in its constructor.

    Raises:
        TypeError: `cls` is not a subclass of the object's class.
    """
    if not issubclass(cls, type(built)):
        raise TypeError(f"{cls.__name__} is no subclass of {type(built).__name__}")
    built.__class__ = cls
    return cast(T, built)
