"""Files that are there whole or not at all, and that survive a loss of power."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

TEMPORARY = ".tmp"


def write_small(path: Path, data: bytes) -> None:
    """Write a file that is there whole or not at all."""
    with _temporary(path) as temporary:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(descriptor, rest) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_whole(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Do the same for what `write` puts into the open file piece by piece."""
    with _temporary(path) as temporary, temporary.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """Give a file another name until it is complete. If writing fails, nothing is left."""
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def move(file: Path, place: Path) -> None:
    """Move a file, also to another disk. At its new place it is whole or not there."""
    try:
        os.replace(file, place)
    except OSError as reason:
        if reason.errno != errno.EXDEV:
            raise
        with file.open("rb") as source:
            write_whole(place, lambda target: shutil.copyfileobj(source, target, 1 << 20))


def sync(path: Path) -> None:
    """Bring a file's bytes, or the names in a folder, onto the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
