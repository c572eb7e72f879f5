"""A command is defined once, by a frozen dataclass of its options. Front ends make their functions of it.

A field is `Annotated` as typer reads it. typer gets a function with keyword-only options. NeMo-Run, and with it hydra,
gets a function with plain values, under the names that they have there.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Optional, get_args, get_origin, get_type_hints

REQUIRED: Any = inspect.Parameter.empty


@dataclass(frozen=True)
class Read:
    """Stands in the annotation of a field whose value front ends give as text."""

    make: Callable[[str, str], Any]
    """Makes the value from the option's name and the text, or raises ConfigurationError."""


@dataclass(frozen=True)
class Command:
    """A command: its name, its options, and the function that runs it."""

    name: str
    options: type[Any]
    """A frozen dataclass, whose docstring is the help."""
    run: Callable[[Any], None]


def as_typer(command: Command) -> Callable[..., None]:
    """Return the function that `typer.Typer.command` takes."""
    hints = get_type_hints(command.options, include_extras=True)

    def call(**options: Any) -> None:
        command.run(
            command.options(**{name: _read(name, hints[name], value) for name, value in options.items()})
        )

    parameters = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=_default(field),
            annotation=_of_text(hints[field.name]),
        )
        for field in fields(command.options)
    ]
    return _signed(call, command, parameters)


@dataclass(frozen=True)
class Given:
    """Other options from which an option is made, for front ends whose values are plain."""

    by: Mapping[str, tuple[Any, Any]]
    """Annotation and default of each of these options. `REQUIRED` means that there is no default."""
    make: Callable[..., Any]
    """Makes the option's value from their values, given by keyword."""


def as_plain(
    command: Command,
    *,
    module: str,
    given: Mapping[str, Given] | None = None,
    fixed: Mapping[str, Any] | None = None,
) -> Callable[..., None]:
    """Return a function whose options are texts, numbers and truth values, annotated as NeMo-Run reads them.

    Args:
        command: The command.
        module: The module that has the function under the command's name. NeMo-Run serialises tasks by that.
        given: Options that are given in another way. All others are given under their own names.
        fixed: Options that cannot be given, and their values.
    """
    hints = get_type_hints(command.options, include_extras=True)
    known = {field.name: field for field in fields(command.options)}
    ways = {
        name: _by_itself(field, hints[name]) if given is None or name not in given else given[name]
        for name, field in known.items()
        if fixed is None or name not in fixed
    }

    def call(**options: Any) -> None:
        bound = signature.bind(**options)
        bound.apply_defaults()
        made = {
            name: way.make(**{option: bound.arguments[option] for option in way.by})
            for name, way in ways.items()
        }
        command.run(command.options(**made, **(fixed or {})))

    parameters = [
        inspect.Parameter(option, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        for way in ways.values()
        for option, (annotation, default) in way.by.items()
    ]
    signature = inspect.Signature(parameters, return_annotation=None)
    call.__module__ = module
    return _signed(call, command, parameters)


def _by_itself(field: "Field[Any]", hint: Any) -> Given:
    inner, optional = _without_none(_of_text(hint))
    plain = str if inner is Path else inner
    # NeMo-Run reads no `X | None`, and a path there is text.
    annotation = Optional[plain] if optional else plain  # noqa: UP045

    def make(**values: Any) -> Any:
        ((name, value),) = values.items()
        value = _read(name, hint, value)
        return Path(value) if inner is Path and isinstance(value, str) else value

    return Given({field.name: (annotation, _default(field))}, make)


def _reader(hint: Any) -> Read | None:
    return next((one for one in getattr(hint, "__metadata__", ()) if isinstance(one, Read)), None)


def _read(name: str, hint: Any, value: Any) -> Any:
    reader = _reader(hint)
    return reader.make(name, value) if reader is not None and isinstance(value, str) else value


def _of_text(hint: Any) -> Any:
    """Return the annotation of the text that a value is read from, and any other annotation as it is."""
    if _reader(hint) is None:
        return hint
    kept = tuple(one for one in hint.__metadata__ if not isinstance(one, Read))
    text = str | None if _without_none(hint)[1] else str
    return Annotated[(text, *kept)] if kept else text


def _signed(call: Any, command: Command, parameters: list[inspect.Parameter]) -> Callable[..., None]:
    call.__name__ = call.__qualname__ = command.name
    call.__doc__ = command.options.__doc__
    call.__signature__ = inspect.Signature(parameters, return_annotation=None)
    call.__annotations__ = {one.name: one.annotation for one in parameters} | {"return": None}
    return call


def _default(field: "Field[Any]") -> Any:
    return REQUIRED if field.default is MISSING else field.default


def _without_none(hint: Any) -> tuple[Any, bool]:
    if get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    kinds = [kind for kind in get_args(hint) if kind is not type(None)]
    optional = type(None) in get_args(hint)
    return (kinds[0] if optional and len(kinds) == 1 else hint), optional
