"""One definition of a command, a frozen dataclass of its options, and the functions that front ends make of it.

A field is `Annotated` as typer reads it. typer gets a function of keyword-only options; NeMo-Run, and with it hydra, one
of plain values under the names that it has there.
"""

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Optional, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class Command:
    """A command: its name, its options, and what it does with them."""

    name: str
    options: type[Any]
    """A frozen dataclass, whose docstring is the help."""
    run: Callable[[Any], None]


def as_typer(command: Command) -> Callable[..., None]:
    """The function that `typer.Typer.command` takes."""
    hints = get_type_hints(command.options, include_extras=True)

    def call(**options: Any) -> None:
        command.run(command.options(**options))

    parameters = [_parameter(field.name, field, hints[field.name]) for field in fields(command.options)]
    return _signed(call, command, parameters)


def as_plain(
    command: Command,
    *,
    module: str,
    renamed: Mapping[str, str],
    fixed: Mapping[str, Any],
    required: Collection[str] = (),
) -> Callable[..., None]:
    """A function whose options are texts, numbers and truth values, with real annotations, as NeMo-Run reads them.

    Args:
        command: The command.
        module: Where it will be found by the command's name: NeMo-Run writes tasks down by that.
        renamed: Options that have another name there.
        fixed: Options that it does not have there, and their values.
        required: Options that have to be given there, though they have a default.
    """
    hints = get_type_hints(command.options)
    shown = {
        field.name: renamed.get(field.name, field.name)
        for field in fields(command.options)
        if field.name not in fixed
    }

    def call(**options: Any) -> None:
        given = {
            name: _read(hints[name], options[there]) for name, there in shown.items() if there in options
        }
        command.run(command.options(**given, **fixed))

    parameters = []
    for field in fields(command.options):
        if field.name in required:
            made = _parameter(shown[field.name], field, _plain(_without_none(hints[field.name])[0]))
            parameters.append(made.replace(default=inspect.Parameter.empty))
        elif field.name in shown:
            parameters.append(_parameter(shown[field.name], field, _plain(hints[field.name])))
    call.__module__ = module
    return _signed(call, command, parameters)


def _signed(call: Any, command: Command, parameters: list[inspect.Parameter]) -> Callable[..., None]:
    call.__name__ = call.__qualname__ = command.name
    call.__doc__ = command.options.__doc__
    call.__signature__ = inspect.Signature(parameters, return_annotation=None)
    call.__annotations__ = {one.name: one.annotation for one in parameters} | {"return": None}
    return call


def _parameter(name: str, field: "Field[Any]", annotation: Any) -> inspect.Parameter:
    default = inspect.Parameter.empty if field.default is MISSING else field.default
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _plain(hint: Any) -> Any:
    """NeMo-Run reads no `X | None`, and a path there is text."""
    inner, optional = _without_none(hint)
    plain = str if inner is Path else inner
    return Optional[plain] if optional else plain  # noqa: UP045


def _read(hint: Any, value: Any) -> Any:
    return Path(value) if _without_none(hint)[0] is Path and isinstance(value, str) else value


def _without_none(hint: Any) -> tuple[Any, bool]:
    if get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    kinds = [kind for kind in get_args(hint) if kind is not type(None)]
    optional = type(None) in get_args(hint)
    return (kinds[0] if optional and len(kinds) == 1 else hint), optional
