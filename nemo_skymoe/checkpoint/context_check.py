"""The `context/io.json` that NeMo builds a model from, walked first: it may name any class or function to be called."""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nemo_skymoe.checkpoint import allowed_classes, inert_pickle
from nemo_skymoe.config import ConfigurationError

IO_JSON = "io.json"
_LARGEST = 1 << 28


def check_context(folder: Path) -> None:
    """Refuse a context that names anything outside the list; a folder without `io.json` passes.

    Names are looked up only once they are on the list, since a module of NeMo's also has those that it imports.

    Raises:
        ConfigurationError: The file and the class, or how it is damaged.
    """
    file = folder / IO_JSON
    if not file.is_file():
        return
    try:
        if file.stat().st_size > _LARGEST:
            raise ValueError(f"{file.stat().st_size:,} bytes")
        content = json.loads(file.read_bytes())
        references = [
            (one["module"], one["name"]) for one in _dictionaries(content) if {"module", "name"} <= set(one)
        ]
        # In place too: a node need not stand among the objects.
        nodes = [
            one for one in _dictionaries(content) if isinstance(one.get("type"), dict) and "items" in one
        ]
        found = [_pickle(node, content["objects"]) for node in nodes if _is_artifact(node)]
        pickles = [path for path in found if path is not None]
    except OSError as reason:
        raise ConfigurationError(f"'{file}' cannot be read: {reason.strerror}") from None
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError) as reason:
        raise ConfigurationError(f"'{file}' is damaged: {type(reason).__name__} ({reason})") from None
    for module, name in dict.fromkeys(references):
        _check_reference(module, name, file)
    if any(_runs_code_beside_a_tokenizer(one) for one in _dictionaries(content)):
        raise ConfigurationError(
            f"'{file}' sets trust_remote_code, which runs code of the tokenizer's folder: expected a tokenizer without"
        )
    for path in pickles:
        _check_pickle(folder / path)


def _dictionaries(value: Any) -> Iterator[dict[str, Any]]:
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            yield one
            waiting += one.values()
        elif isinstance(one, list):
            waiting += one


def _check_reference(module: Any, name: Any, file: Path) -> None:
    if not isinstance(module, str) or not isinstance(name, str):
        raise _refusal(f"{module}.{name}", file)
    if _is_a_callback_here(module, name):
        return
    if not _is_allowed(module, name):
        raise _refusal(f"{module}.{name}", file)
    with contextlib.suppress(ImportError, AttributeError):  # NeMo says so itself
        home = _home(module, name)
        if not _is_allowed(*home):
            raise _refusal(".".join(home), file)


def _home(module: str, name: str) -> tuple[str, str]:
    """Where a class or function of an allowed name is defined: modules also have those that they import."""
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    if not callable(found):
        return module, name
    return getattr(found, "__module__", None) or module, getattr(found, "__qualname__", name)


def _is_a_callback_here(module: str, name: str) -> bool:
    """A callback of the user's own, in a module that this process has imported already: nothing is imported for it."""
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


def _refusal(name: str, file: Path) -> ConfigurationError:
    return ConfigurationError(
        f"'{file}' names '{name}', which no model needs: nothing of it was built; {allowed_classes.advice(name)}"
    )


def _is_artifact(entry: dict[str, Any]) -> bool:
    """Whether NeMo takes its one value for the path of a pickle."""
    return (
        entry["type"]["module"].partition(".")[0] not in ("fiddle", "builtins", "nemo_run")
        and len(entry["items"]) == 1
    )


def _pickle(entry: dict[str, Any], objects: dict[str, Any]) -> str | None:
    """The path; None where the one value is an argument of another kind, which NeMo cannot open."""
    value = entry["items"][0][1]
    if value.get("type") == "ref":
        home = objects[value["key"]].get("type", {})
        if isinstance(home, dict) and home.get("module") == "pathlib":
            raise ValueError("a path object in the place of a pickle's path")
        return None
    path = value.get("value")
    return path if isinstance(path, str) else None


def _check_pickle(file: Path) -> None:
    if not file.is_file():
        return
    try:
        inert_pickle.load(file.read_bytes(), _Allowed(), file)
    except inert_pickle.NotAllowedError as reason:
        raise ConfigurationError(f"{reason}; {allowed_classes.advice(reason.name)}") from None


class _Allowed:
    def __contains__(self, name: object) -> bool:
        if not isinstance(name, str):
            return False
        if allowed_classes.may_be_pickled(name):
            return True
        module, _, last = name.rpartition(".")
        if _is_a_callback_here(module, last):
            return True
        try:
            return _is_allowed(module, last) and _is_allowed(*_home(module, last))
        except (ImportError, AttributeError):
            return False


def _runs_code_beside_a_tokenizer(value: dict[str, Any]) -> bool:
    return any(
        isinstance(item, list)
        and len(item) == 2
        and "trust_remote_code" in str(item[0])
        and isinstance(item[1], dict)
        and item[1].get("value", True) not in (False, None)
        for item in value.get("items", ())
        if isinstance(value.get("items"), list)
    )
