"""Scan the `context/io.json` that NeMo builds a model from, because it may name any class or function to be called."""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nemo_skymoe.checkpoint.untrusted import allowed_classes, inert_pickle
from nemo_skymoe.checkpoint.untrusted.context_graph import Graph, Place, dictionaries
from nemo_skymoe.checkpoint.untrusted.inert_pickle import Record
from nemo_skymoe.checkpoint.untrusted.torch_file_check import check_call
from nemo_skymoe.durable.errors import CheckpointError

CONTEXT, IO_JSON = "context", "io.json"
_LARGEST = 1 << 28
_REMOTE_CODE = "trust_remote_code"
_WITHOUT_NAMES = ("pathlib", "builtins", "torch")
"""Modules whose classes take arguments by position."""


def check_context(folder: Path) -> None:
    """Refuse a context that names anything outside the list; a folder without `io.json` passes.

    Names are looked up only once they are on the list, since a module of NeMo's also has those that it imports.

    Raises:
        CheckpointError: The file and the class, or how it is damaged.
    """
    file = folder / IO_JSON
    if not file.is_file():
        return
    try:
        if file.stat().st_size > _LARGEST:
            raise ValueError(f"{file.stat().st_size:,} bytes")
        content = json.loads(file.read_bytes())
        references = [
            (one["module"], one["name"]) for one in dictionaries(content) if {"module", "name"} <= set(one)
        ]
    except OSError as reason:
        raise CheckpointError(f"'{file}' cannot be read: {reason.strerror}") from None
    except (ValueError, TypeError, RecursionError) as reason:
        raise _damaged(file, reason) from None
    # Before anything else is looked at: what a file names says best what is wrong with it.
    for module, name in dict.fromkeys((str(module), str(name)) for module, name in references):
        _check_reference(module, name, file)
    try:
        graph = Graph(content)
        calls, dictionaries_ = list(graph.calls()), list(graph.dictionaries())
        pickles = list(graph.artifacts())
    except (ValueError, TypeError, AttributeError, LookupError) as reason:
        raise _damaged(file, reason) from None
    for (module, name), arguments in calls:
        _check_call(module, name, arguments, file)
    _check_remote_code(content, [*(arguments for _, arguments in calls), *dictionaries_], file)
    for path in pickles:
        _check_pickle(folder / path)


def _damaged(file: Path, reason: Exception) -> CheckpointError:
    return CheckpointError(f"'{file}' is damaged: {type(reason).__name__} ({reason})")


def _check_call(module: str, name: str, arguments: list[tuple[Place, Any]], file: Path) -> None:
    if not _may_be_built(module, name):
        raise _refusal(f"{module}.{name}", file)
    if module.partition(".")[0] not in _WITHOUT_NAMES and not all(
        isinstance(container[key], str) for (container, key), _ in arguments
    ):
        raise CheckpointError(
            f"'{file}' is damaged: '{module}.{name}' has arguments without names, expected those that NeMo writes"
        )


def _may_be_built(module: str, name: str) -> bool:
    if _is_a_callback_here(module, name):
        return True
    try:
        home = _home(module, name)
    except (ImportError, AttributeError):  # NeMo says so itself
        home = module, name
    return all(allowed_classes.may_be_built(".".join(place)) for place in ((module, name), home))


def _check_remote_code(content: Any, arguments: list[list[tuple[Place, Any]]], file: Path) -> None:
    """Refuse the argument that runs code of a tokenizer's folder, and its name where it may become an argument's."""
    known = set[tuple[int, Any]]()
    for (container, key), value in (pair for pairs in arguments for pair in pairs):
        if isinstance(container[key], str) and _REMOTE_CODE in container[key]:
            known.add((id(container), key))
            if value is not None and value is not False:
                raise CheckpointError(
                    f"'{file}' sets {_REMOTE_CODE}, which runs code of the tokenizer's folder: expected a tokenizer"
                    " without"
                )
    if any(place not in known for place in _places_of_text(content, _REMOTE_CODE)):
        raise CheckpointError(
            f"'{file}' has {_REMOTE_CODE}, which runs code of a tokenizer's folder, where it is not the name of an"
            " argument: expected what NeMo writes"
        )


def _places_of_text(content: Any, text: str) -> Iterator[tuple[int, Any]]:
    """Yield the places where a text stands, but for those that fiddle does not read: the texts of paths."""
    waiting, paths = [content], set[int]()
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            if "type" in one and isinstance(one.get("items"), list):
                paths |= {id(item) for item in one["items"] if isinstance(item, list)}
            pairs = [(key, value) for key, value in one.items() if not (key == "paths" and "type" in one)]
            yield from ((id(one), (key,)) for key, _ in pairs if text in key)
        elif isinstance(one, list):
            pairs = [(key, value) for key, value in enumerate(one) if key or id(one) not in paths]
        else:
            continue
        yield from ((id(one), key) for key, value in pairs if isinstance(value, str) and text in value)
        waiting += [value for _, value in pairs]


def _check_reference(module: str, name: str, file: Path) -> None:
    if _is_a_callback_here(module, name):
        return
    if not _is_allowed(module, name):
        raise _refusal(f"{module}.{name}", file)
    with contextlib.suppress(ImportError, AttributeError):  # NeMo says so itself
        home = _home(module, name)
        if not _is_allowed(*home):
            raise _refusal(".".join(home), file)


def _home(module: str, name: str) -> tuple[str, str]:
    """Return the place where a class or function is defined, because modules also have the names that they import."""
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    if not callable(found):
        return module, name
    return getattr(found, "__module__", None) or module, getattr(found, "__qualname__", name)


def _split(name: str) -> tuple[str, str]:
    module, _, last = name.rpartition(".")
    return module, last


def _is_a_callback_here(module: str, name: str) -> bool:
    """Say whether it is a callback of the user's own, in a module that is imported already; none is imported."""
    callbacks, home = sys.modules.get("lightning.pytorch.callbacks"), sys.modules.get(module)
    found = getattr(home, name, None)
    return (
        callbacks is not None
        and isinstance(found, type)
        and issubclass(found, callbacks.Callback)
        and found.__module__ == module
    )


def _is_allowed(module: str, name: str) -> bool:
    return allowed_classes.may_be_configured(f"{module}.{name}") and all(
        part[:1].isupper() or part.startswith("_") for part in name.split(".")[:-1]
    )


def _refusal(name: str, file: Path) -> CheckpointError:
    return CheckpointError(
        f"'{file}' names '{name}', which no model needs: nothing of it was built; {allowed_classes.advice(name)}"
    )


def _check_pickle(file: Path) -> None:
    if not file.is_file():
        return

    def check(record: Record) -> None:
        if not allowed_classes.may_be_pickled(record.kind) and not _may_be_built(*_split(record.kind)):
            raise _refusal(record.kind, file)
        check_call(record, file)

    try:
        inert_pickle.load(file.read_bytes(), _Allowed(), file, called=check)
    except inert_pickle.NotAllowedError as reason:
        raise CheckpointError(f"{reason}; {allowed_classes.advice(reason.name)}") from None


class _Allowed:
    def __contains__(self, name: object) -> bool:
        if not isinstance(name, str):
            return False
        if allowed_classes.may_be_pickled(name):
            return True
        module, last = _split(name)
        if _is_a_callback_here(module, last):
            return True
        try:
            return _is_allowed(module, last) and _is_allowed(*_home(module, last))
        except (ImportError, AttributeError):
            return False
