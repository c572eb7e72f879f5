"""Scan the index files beside a data set before NeMo and Megatron unpickle them or map them into memory.

Both read the arrays of their caches with `numpy.load(allow_pickle=True)`. It takes anything that is not an array for a
pickle, and it unpickles arrays of objects, such as packed sequences. NeMo describes the lines of a JSONL file in a
pickle, `*.idx.info`. Megatron maps `*.idx` into memory, and trusts its counts and places.
"""

from __future__ import annotations

import dataclasses
import os
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from nemo_skymoe.checkpoint.untrusted import allowed_classes, inert_pickle
from nemo_skymoe.checkpoint.untrusted.torch_file_check import check_call
from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.folders import every_file
from nemo_skymoe.nemo.dataset_index import check_dataset_index

_LARGEST_INFO = 1 << 20
_UNREADABLE = (
    *(OSError, ValueError, EOFError, SyntaxError, OverflowError, TypeError, MemoryError, RecursionError),
    tokenize.TokenError,
)
"""Exceptions that numpy raises for an array whose header is damaged."""


def check_data_module(data: Any) -> None:
    """Refuse a data module whose folders have a damaged index, or a pickle of anything but plain values.

    Raises:
        ConfigurationError: The message names the file, and the class that it refers to or what is wrong with it.
    """
    for folder in sorted(set(_folders(vars(data)))) if hasattr(data, "__dict__") else ():
        check_indices(folder)


def check_indices(folder: Path) -> None:
    """Make the checks of `check_data_module` in one folder and those below it, also behind links."""
    for file in every_file(folder):
        if file.name.endswith(".npy"):
            _check_array(file)
        elif file.name.endswith(".idx.info"):
            _check_info(file)
        elif file.name.endswith(".idx") and file.with_suffix(".bin").exists():
            check_dataset_index(file)


def _check_info(file: Path) -> None:
    if not file.is_file() or file.stat().st_size > _LARGEST_INFO:
        raise ConfigurationError(f"'{file}' is no file of at most {_LARGEST_INFO:,} bytes, as NeMo writes it")
    inert_pickle.load(file.read_bytes(), (), file)


def _check_array(file: Path) -> None:
    try:
        if not file.is_file():
            raise ValueError("no regular file")
        with file.open("rb") as stream:
            version = np.lib.format.read_magic(stream)
            if _has_objects(stream, version):
                _check_objects(stream.read(), file)
                return
        np.load(file, mmap_mode="r", allow_pickle=False)
    except ConfigurationError:
        raise
    except _UNREADABLE as reason:
        said = " ".join(str(reason).split())[:200]
        raise ConfigurationError(
            f"'{file}' is no array of numbers ({said}): delete it, it is written again from the data"
        ) from None


def _has_objects(stream: Any, version: tuple[int, int]) -> bool:
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    return version in readers and readers[version](stream)[2].hasobject


def _check_objects(pickled: bytes, file: Path) -> None:
    """Scan the pickle behind the header of an array of objects."""
    try:
        inert_pickle.load(pickled, _Allowed(), file, called=lambda record: check_call(record, file))
    except inert_pickle.NotAllowedError as reason:
        raise ConfigurationError(f"{reason}; {allowed_classes.advice(reason.name)}") from None


class _Allowed:
    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and allowed_classes.may_be_pickled(name)


def _folders(value: Any) -> Iterator[Path]:
    """Yield the folders in a data module's attributes, and those of the data sets whose prefixes they name."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = vars(value)
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    if isinstance(value, list | tuple):
        for item in value:
            yield from _folders(item)
    elif isinstance(value, str | os.PathLike) and len(str(value)) < 4096 and "\0" not in str(value):
        path = Path(value)
        if path.is_dir():
            yield path
        elif len(path.parts) > 1 and (Path(f"{path}.idx").is_file() or path.is_file()):
            yield path.parent
