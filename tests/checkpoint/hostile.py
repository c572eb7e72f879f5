"""Files that make a marker when something unpickles, imports or calls what they name: builders for tests."""

import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

METADATA = "fiddle._src.config.BuildableTraverserMetadata"
CONFIG = "fiddle._src.config.Config"


class Calls:
    """Pickled as a call of `function`."""

    def __init__(self, function: Callable[..., Any], *arguments: Any):
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def payload(marker: Path) -> bytes:
    """A pickle that makes the marker; protocol 2 is what torch's old form has."""
    return pickle.dumps(Calls(os.system, f"touch {marker}"), protocol=2)


def archived(pickled: bytes, **entries: bytes) -> bytes:
    """An archive as `torch.save` writes it, with the pickle inside."""
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", b"3\n")
        for name, content in entries.items():
            archive.writestr(name, content)
    return written.getvalue()


def code(marker: Path) -> str:
    """A module that makes the marker when it is imported."""
    return f"import os\nos.system('touch {marker}')\nclass Made: pass\n"


def reference(name: str) -> dict[str, Any]:
    """A class or function in a context."""
    module, _, last = name.rpartition(".")
    return {"type": "pyref", "module": module, "name": last}


def leaf(value: Any) -> dict[str, Any]:
    return {"type": "leaf", "value": value}


def node(
    kind: str, values: Sequence[Any], metadata: Any, texts: Sequence[str] | None = None
) -> dict[str, Any]:
    """An object in a context; `texts` are the paths, which fiddle does not read."""
    texts = texts or [f"Index(index={number})" for number in range(len(values))]
    return {
        "type": reference(kind),
        "items": [list(item) for item in zip(texts, values, strict=True)],
        "metadata": metadata,
    }


def names(values: Sequence[Any]) -> dict[str, Any]:
    return node("builtins.tuple", values, None)


def metadata(function: str, argument_names: Any) -> dict[str, Any]:
    """What fiddle builds an object by."""
    empty = node("builtins.dict", [], names([]))
    return node(METADATA, [reference(function), argument_names, empty, empty], reference(METADATA))


def configured(function: str, arguments: Mapping[str, Any], kind: str = CONFIG) -> dict[str, Any]:
    """A call of `function`, as fiddle writes it."""
    values = [value if isinstance(value, dict) else leaf(value) for value in arguments.values()]
    texts = [f"Attr(name='{name}')" for name in arguments]
    return node(kind, values, metadata(function, names(list(arguments))), texts)


def context(root: Mapping[str, Any], **objects: Any) -> bytes:
    """An `io.json`."""
    root = dict(root) | {"paths": ["<root>"]}
    made = {"root": {"type": "ref", "key": "root_1"}, "objects": {"root_1": root} | objects}
    return json.dumps(made | {"refcounts": {}, "version": "0.0.1"}).encode()
