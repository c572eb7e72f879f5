"""The files that travel with the weights, byte for byte: the tokenizer's, and the defaults of generation.

Everything else beside the weights stays behind or is written anew: config.json, modeling code, model cards, licences.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from nemo_skymoe.checkpoint.config_values import read_bytes, read_json
from nemo_skymoe.config import ConfigurationError

GENERATION_FILES = ("generation_config.json",)
TOKENIZER_FILES = (
    *("tokenizer.*", "tokenizer_*", "tokenization_*.py", "tekken*.json", "vocab.*", "merges.txt"),
    *("*.model", "*.tiktoken", "*.spm", "*.bpe", "*.vocab", "bpe.codes", "encoder.json", "dict.txt"),
    *("added_tokens.json", "special_tokens*.json", "normalizer.json"),
    *("chat_template*.jinja", "chat_template*.json", "additional_chat_templates/*.jinja"),
)
"""By pattern; with them the code that `auto_map` names for the tokenizer, and what that imports from its folder."""
_CONTEXT, _TOKENIZER = "context", "tokenizer"
_IMPORT = re.compile(r"^\s*from\s+\.(\w*)\s+import\s+([\w ,]+)", re.MULTILINE)


def companion_files(folder: Path) -> dict[str, bytes]:
    """What travels of a folder, by relative path.

    Raises:
        ConfigurationError: One cannot be read, is no file, or is a link to a file that has another name.
    """
    return {name: read_bytes(folder / name) for name in companion_names(folder)}


def companion_names(folder: Path) -> list[str]:
    """The relative paths of `companion_files`. Errors as there."""
    patterns = (*TOKENIZER_FILES, *GENERATION_FILES)
    found = {file for pattern in patterns for file in folder.glob(pattern)} | set(_code(folder))
    for file in found:
        _check_link(file, folder)
    return sorted(file.relative_to(folder).as_posix() for file in found)


def find_companions(context: Path) -> Path | None:
    """The folder with these files in a NeMo checkpoint's context, if there are any."""
    ours = context / _TOKENIZER
    if ours.is_dir() and companion_names(ours):
        return ours
    surest = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
    for patterns in (surest, TOKENIZER_FILES):
        names = [pattern for pattern in patterns if "/" not in pattern]
        files = [file for name in names for file in context.glob(f"**/{name}") if file.is_file()]
        if files:
            return min(file.parent for file in files)
    return None


def _check_link(file: Path, folder: Path) -> None:
    """A copy of what lies elsewhere goes into every export: a link must not fetch a secret under another name."""
    real, home = Path(os.path.realpath(file)), folder.resolve()
    if not real.is_file():
        raise ConfigurationError(f"'{file}' is '{real}', expected a regular file")
    blobs = real.parent.name == "blobs" and (
        real.parent.parent.name.startswith("models--") or real.parent.parent == home.parent.parent
    )
    if not (real.is_relative_to(home) or real.name == file.name or blobs):
        raise ConfigurationError(
            f"'{file}' is a link to '{real}', expected a regular file inside its folder, a blob of the Hugging Face"
            " cache, or a file of the same name: put a copy in the link's place"
        )


def _code(folder: Path) -> Iterator[Path]:
    """The modules of a tokenizer that brings its own code."""
    waiting, seen = list(_named_modules(folder)), set[str]()
    while waiting:
        name = waiting.pop()
        file = folder / f"{name}.py"
        if name in seen or not file.is_file():
            continue
        seen.add(name)
        yield file
        for module, names in _IMPORT.findall(read_bytes(file).decode(errors="replace")):
            waiting += [module] if module else re.findall(r"\w+", names)


def _named_modules(folder: Path) -> Iterator[str]:
    configs = [folder / "tokenizer_config.json", folder / "config.json"]
    if (folder.parent.name, folder.name) == (_CONTEXT, _TOKENIZER):
        configs.append(folder.parent / "config.json")
    for config in configs:
        classes = read_json(config).get("auto_map") if config.is_file() else None
        named = classes.get("AutoTokenizer") if isinstance(classes, dict) else classes
        for name in named if isinstance(named, list) else [named]:
            if isinstance(name, str) and re.fullmatch(r"\w+\.\w+", name):
                yield name.partition(".")[0]
