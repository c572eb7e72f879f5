"""Read regions of files without mapping them. If something is wrong, the message names the file."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeGuard

from nemo_skymoe.durable.errors import CheckpointError
from nemo_skymoe.durable.stand_in import BEGINNING, refuse_stand_in


def member(folder: Path, name: object, named_by: Path) -> Path:
    """Return the regular file `name` of `folder`, which `named_by` names, and refuse a name that leads elsewhere.

    The contents of files decide on names, so a name never leaves the folder. Whoever made the folder decides on its
    links, which may lead anywhere: to the blobs of the Hugging Face cache, or to another disk.
    """
    if not isinstance(name, str) or not name or "\0" in name or Path(name).name != name or name == "..":
        raise CheckpointError(f"'{named_by}' names the file {name!r}, expected a file in the same folder")
    path = folder / name
    try:
        status = path.stat()
    except (OSError, RuntimeError) as reason:
        link = f", a link to '{os.readlink(path)}'," if path.is_symlink() else ""
        what = reason.strerror if isinstance(reason, OSError) else reason
        raise CheckpointError(
            f"'{path}'{link} named by '{named_by.name}' cannot be opened: {what}; download or copy it anew"
        ) from None
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"'{path}' is not a regular file")
    refuse_stand_in(path, read_bytes(path, 0, min(status.st_size, BEGINNING)))
    return path


def read_into(path: Path, start: int, target: memoryview) -> None:
    """Fill `target` with the file's bytes from `start` on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        while len(target):
            count = os.preadv(descriptor, [target], start)
            if count == 0:
                raise CheckpointError(
                    f"'{path}' is truncated: it ends at byte {start}; download or copy it anew"
                )
            start, target = start + count, target[count:]
    except OSError as reason:
        raise CheckpointError(f"'{path}' cannot be read: {reason}") from reason
    finally:
        os.close(descriptor)


def read_bytes(path: Path, start: int, size: int) -> bytes:
    """Return `size` bytes of a file. The caller has checked that the file is that long."""
    data = bytearray(size)
    read_into(path, start, memoryview(data))
    return bytes(data)


def are_sizes(values: Any) -> TypeGuard[Sequence[int]]:
    """Say whether something read from a file is a list of sizes or offsets that a tensor can have."""
    return (
        isinstance(values, list | tuple)
        and len(values) <= 16
        and all(type(size) is int and 0 <= size < 2**62 for size in values)
    )
