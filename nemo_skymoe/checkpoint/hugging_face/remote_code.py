"""The Python code that travels in a folder of Hugging Face's form, which transformers runs where it is told to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nemo_skymoe.checkpoint.config_values import read_bytes, read_json
from nemo_skymoe.checkpoint.hugging_face.exported_files import AUTO_MAP, EXPORT, MODELING_FILES
from nemo_skymoe.checkpoint.untrusted import allowed_classes
from nemo_skymoe.durable.errors import CheckpointError

_AUTO_MAP, _ATTENTION, _GENERATION = "auto_map", "attn_implementation", "custom_generate"
_OF_DATA = ("tokenizer.json", "vocab.json", "model.safetensors.index.json", "added_tokens.json")


def check_code(folder: Path) -> bool:
    """Refuse a model that brings code along, other than the modeling files that `skymoe convert` writes.

    Returns:
        Whether it has those, so that transformers has to be told to run them.

    Raises:
        CheckpointError: The file that names other code, or a modeling file that is not the package's.
    """
    if (folder / _GENERATION).exists():
        raise CheckpointError(
            f"'{folder / _GENERATION}' is code that transformers would run: expected a model without, or the modeling"
            " files of skymoe convert alone"
        )
    named = [(file, name) for file in sorted(folder.glob("*.json")) for name in _named(file)]
    for file, name in named:
        if name not in AUTO_MAP.values() and not allowed_classes.is_vouched_for(name):
            raise CheckpointError(
                f"'{file}' names '{name}', code that transformers would run: expected the modeling files that skymoe"
                f" convert writes; if you know where it is from and need it, set {allowed_classes.VARIABLE}={name}"
            )
    for name in MODELING_FILES if any(name in AUTO_MAP.values() for _, name in named) else ():
        if read_bytes(folder / name) != (EXPORT / name).read_bytes():
            raise CheckpointError(
                f"'{folder / name}' is not the modeling file that this version of skymoe writes, and would be run:"
                " expected that file byte for byte; export the model again, or put the package's in its place"
            )
    return bool(named)


def _named(file: Path) -> Iterator[str]:
    """Yield the classes outside of transformers that a file of the configuration wants to have imported."""
    if file.name in _OF_DATA:
        return
    waiting: list[Any] = [read_json(file)]
    while waiting:
        one = waiting.pop()
        if isinstance(one, list):
            waiting += one
        elif isinstance(one, dict):
            for key, value in one.items():
                if key == _AUTO_MAP:
                    yield from _texts(value)
                elif key.endswith(_ATTENTION) and "/" in str(value):  # a kernel from the hub
                    yield str(value)
                else:
                    waiting.append(value)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        value = [*value.values()]
    if isinstance(value, list):
        for item in value:
            yield from _texts(item)
    elif value is not None:
        yield str(value)
