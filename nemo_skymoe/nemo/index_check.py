"""The index files beside a data set that NeMo and Megatron unpickle, walked first without building anything.

Both read the arrays of their caches with `numpy.load(allow_pickle=True)`, which takes whatever is no array for a
pickle, and NeMo describes the lines of a JSONL file in a pickle, `*.idx.info`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from nemo_skymoe.checkpoint import inert_pickle
from nemo_skymoe.config import ConfigurationError

_LARGEST_INFO = 1 << 20


def check_data_module(data: Any) -> None:
    """Refuse a data module whose folders have an index that is a pickle of anything but plain values.

    Raises:
        ConfigurationError: The file, and the class that it refers to.
    """
    for folder in sorted(set(_folders(vars(data)))) if hasattr(data, "__dict__") else ():
        check_indices(folder)


def check_indices(folder: Path) -> None:
    """As `check_data_module`, in one folder and those below it."""
    for file in sorted(folder.rglob("*.npy")):
        _check_array(file)
    for file in sorted(folder.rglob("*.idx.info")):
        if file.stat().st_size > _LARGEST_INFO:
            raise ConfigurationError(
                f"'{file}' is {file.stat().st_size:,} bytes, expected at most {_LARGEST_INFO:,}"
            )
        inert_pickle.load(file.read_bytes(), (), file)


def _check_array(file: Path) -> None:
    try:
        with file.open("rb") as stream:
            np.lib.format.read_magic(stream)
        np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError, SyntaxError) as reason:
        raise ConfigurationError(
            f"'{file}' is no array of numbers ({reason}): delete it, it is written again from the data"
        ) from None


def _folders(value: Any) -> Iterator[Path]:
    """The folders that a data module's attributes name, or that the prefixes of data sets which they name are in."""
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    if isinstance(value, list | tuple):
        for item in value:
            yield from _folders(item)
    elif isinstance(value, str | Path) and len(str(value)) < 4096 and "\0" not in str(value):
        path = Path(value)
        if path.is_dir():
            yield path
        elif len(path.parts) > 1 and (Path(f"{path}.idx").is_file() or path.is_file()):
            yield path.parent
