"""Refuse things that stand in a file's place: what git-lfs or a failed download left, and links that lead nowhere."""

from __future__ import annotations

import os
import re
from pathlib import Path

from nemo_skymoe.durable.errors import CheckpointError

LFS_POINTER = b"version https://git-lfs.github.com/spec/v1"
BEGINNING = 64
"""Number of bytes at the beginning that are enough to tell."""
_WEB_PAGE = re.compile(rb"\s*<(!doctype html|html|\?xml)", re.IGNORECASE)


def refuse_stand_in(file: Path, begin: bytes) -> None:
    """Refuse a git-lfs pointer, and a web page that a server sent. `begin` is the beginning of the file.

    Raises:
        CheckpointError: It is one of these. The message says what to do.
    """
    if begin.startswith(LFS_POINTER):
        raise CheckpointError(
            f"'{file}' is a git-lfs pointer, not the file itself: run git lfs pull in its folder, or download it anew"
        )
    if _WEB_PAGE.match(begin):
        raise CheckpointError(
            f"'{file}' is a web page, not the file itself, as a refused download leaves it: download it anew, logged in"
        )


def refuse_pointer(file: Path) -> None:
    """Refuse what git-lfs left in place of a file that may be a page of text itself."""
    with file.open("rb") as opened:
        begin = opened.read(len(LFS_POINTER))
    if begin == LFS_POINTER:
        refuse_stand_in(file, begin)


def refuse_pointers(folder: Path, *names: str) -> None:
    """Refuse what git-lfs left in place of those of these files that exist."""
    for name in names:
        if (folder / name).is_file():
            refuse_pointer(folder / name)


def refuse_broken_link(path: Path) -> None:
    """Refuse a link that leads nowhere, or round in a circle."""
    if path.is_symlink() and not path.exists():
        raise CheckpointError(
            f"'{path}' is a link to '{os.readlink(path)}', which cannot be opened: put what it stands for in its place"
        )
