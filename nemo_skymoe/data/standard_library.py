"""The demonstration corpus' text: sources of Python's standard library, which every machine with Python has."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

from nemo_skymoe.config import ConfigurationError

MINIMUM_BYTES = 8_000_000
LEFT_OUT_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
LEFT_OUT_PREFIXES = ("_sysconfigdata", "config-")


def read_sources(files: Sequence[str] | None = None) -> dict[str, str]:
    """Return texts by relative name, sorted by name. A source that is empty or not UTF-8 is left out.

    Args:
        files: Names relative to the standard library; None is all of it but test suites, installed packages, the
            character tables of `encodings`, the generated `pydoc_data` and the build's own `_sysconfigdata`.

    Raises:
        ConfigurationError: All of it is less than `MINIMUM_BYTES` bytes.
    """
    root = Path(sysconfig.get_path("stdlib"))
    texts = {}
    for name in sorted(_source_names(root) if files is None else files):
        try:
            text = (root / name).read_bytes().decode()
        except UnicodeDecodeError:
            continue
        if text:
            texts[name] = text
    if files is None and (found := sum(len(text.encode()) for text in texts.values())) < MINIMUM_BYTES:
        raise ConfigurationError(
            f"Python's standard library at {root} has {found / 1e6:.1f} MB of source text: expected at least "
            f"{MINIMUM_BYTES / 1e6:.0f} MB (a stripped or zipped Python cannot make the corpus)"
        )
    return texts


def _source_names(root: Path) -> Iterator[str]:
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = set(subfolders) - LEFT_OUT_FOLDERS
        for name in files:
            relative = (Path(folder) / name).relative_to(root).as_posix()
            if name.endswith(".py") and not relative.startswith(LEFT_OUT_PREFIXES):
                yield relative
