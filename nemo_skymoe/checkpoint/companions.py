"""The files that travel with the weights, byte for byte: what turns text into tokens and back, and under which terms.

Which they are is decided by their names, see KINDS. Everything else beside the weights stays behind or is written anew:
config.json, modeling code, whatever is in folders.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from nemo_skymoe.checkpoint.config_values import read_bytes, read_json
from nemo_skymoe.durable.errors import CheckpointError
from nemo_skymoe.durable.stand_in import refuse_broken_link

KINDS: dict[str, tuple[str, ...]] = {
    "tokenizer": (
        *("tokenizer.*", "tokenizer_*", "tokenization_*.py", "tekken*.json", "vocab.*", "merges.txt"),
        *("*.model", "*.tiktoken", "*.spm", "*.bpe", "*.vocab", "bpe.codes", "encoder.json", "dict.txt"),
        *("added_tokens.json", "special_tokens*.json", "normalizer.json", "*vocab*.json", "*vocab*.txt"),
    ),
    "chat templates": (
        *("chat_template*.jinja", "chat_template*.json", "additional_chat_templates/*.jinja"),
    ),
    "generation": ("generation_config*.json",),
    "processors": ("*processor_config.json", "feature_extractor_config.json"),
    "terms": (
        *("*license*", "*licence*", "*\u8bb8\u53ef*", "notice*", "copying*", "copyright*", "*use_policy*"),
        *("readme*", "model_card*", "modelcard*", "citation*"),
    ),
}
"""Patterns of names by kind, small and capital letters alike. With them travels the code that `auto_map` names for the
tokenizer and the processors, and what that imports from its folder."""
TOKENIZER_FILES = (*KINDS["tokenizer"], *KINDS["chat templates"])
_CODE = ("AutoTokenizer", "AutoProcessor", "AutoImageProcessor", "AutoFeatureExtractor", "AutoVideoProcessor")
_CONTEXT, _TOKENIZER = "context", "tokenizer"
_IMPORT = re.compile(r"^\s*from\s+\.(\w*)\s+import\s+([\w ,]+)", re.MULTILINE)


def companion_files(folder: Path) -> dict[str, bytes]:
    """Return the files of a folder that travel, with their content, by relative path.

    Raises:
        CheckpointError: One cannot be read, is no file, or is a link to a file that has another name.
    """
    return {name: read_bytes(folder / name) for name in companion_names(folder)}


def companion_names(folder: Path) -> list[str]:
    """Return the relative paths of `companion_files`. Errors as there."""
    return sorted(companion_kinds(folder))


def companion_kinds(folder: Path) -> dict[str, str]:
    """Return the kind of every file that travels, by its relative path. Code counts as the tokenizer's."""
    files = {
        file.relative_to(folder).as_posix(): file for file in (*folder.glob("*"), *folder.glob("*/*.jinja"))
    }
    kinds = {name: kind for name in files if (kind := _kind(name)) is not None}
    kinds = {name: kind for name, kind in kinds.items() if kind != "terms" or not files[name].is_dir()}
    found = {file.name: "tokenizer" for file in _code(folder)} | kinds
    for name in found:
        _check_link(folder / name, folder)
    return found


def _kind(name: str) -> str | None:
    return next((kind for kind, patterns in KINDS.items() if _matches(name, patterns)), None)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(
        fnmatchcase(name.lower(), pattern) and name.count("/") == pattern.count("/") for pattern in patterns
    )


def find_companions(context: Path) -> Path | None:
    """Return the folder with these files in a NeMo checkpoint's context, or in Bridge's checkpoint, if there are any."""
    ours = context / _TOKENIZER
    if ours.is_dir() and companion_names(ours):
        return ours
    surest = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
    for patterns in (surest, TOKENIZER_FILES):
        files = [file for file in context.glob("**/*") if _matches(file.name, patterns) and file.is_file()]
        if files:
            return min(file.parent for file in files)
    return None


def _check_link(file: Path, folder: Path) -> None:
    """Refuse a link that would fetch a secret under another name: a copy of its target goes into every export."""
    real, home = Path(os.path.realpath(file)), folder.resolve()
    refuse_broken_link(file)
    if not real.is_file():
        raise CheckpointError(f"'{file}' is '{real}', expected a regular file")
    blobs = real.parent.name == "blobs" and (
        real.parent.parent.name.startswith("models--") or real.parent.parent == home.parent.parent
    )
    if not (real.is_relative_to(home) or real.name == file.name or blobs):
        raise CheckpointError(
            f"'{file}' is a link to '{real}', expected a regular file inside its folder, a blob of the Hugging Face"
            " cache, or a file of the same name: put a copy in the link's place"
        )


def _code(folder: Path) -> Iterator[Path]:
    """Yield the modules of a tokenizer that brings its own code."""
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
    configs = [
        folder / "config.json",
        folder / "tokenizer_config.json",
        *folder.glob("*processor_config.json"),
    ]
    if folder.name == _TOKENIZER:
        context = folder.parent if folder.parent.name == _CONTEXT else folder.parent / _CONTEXT
        configs.append(context / "config.json")
    for config in configs:
        classes = read_json(config).get("auto_map") if config.is_file() else None
        # In older files the tokenizer's alone, without its name.
        named = [classes.get(name) for name in _CODE] if isinstance(classes, dict) else [classes]
        for names in named:
            for name in names if isinstance(names, list) else [names]:
                if isinstance(name, str) and re.fullmatch(r"\w+\.\w+", name):
                    yield name.partition(".")[0]
