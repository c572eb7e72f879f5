"""Every file below a folder, through links too; what is not followed or not readable is said, never passed over."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from nemo_skymoe.config import ConfigurationError

LeaveOut = Callable[[Path, str], None]
"""Told of a file or folder that is left out, and why; details of the reason are in brackets."""


def every_file(folder: Path) -> Iterator[Path]:
    """Everything below `folder` that is no folder, as programs find it that follow links: broken links too.

    A folder is entered once, by whichever path comes first, so that a link round in a circle ends; a file that two links
    name is given by both.
    """
    seen: set[str] = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        yield from (Path(place, name) for name in sorted(names))


def again(first: Path) -> str:
    """Why a second path to what `first` leads to is left out."""
    return f"read already under another path ({first})"


def files_below(folder: Path, leave_out: LeaveOut, *, hidden: bool = True) -> list[Path]:
    """Return the files below `folder` in the order of their paths, each real file once.

    Links to folders are followed after all folders that are none, so that a file's own path comes before another that a
    link gives it. A link that leads back to a folder it lies in is left out, and so is a second path to the same file.

    Args:
        leave_out: Told of every link that is left out, and of what is hidden.
        hidden: Also files and folders whose names begin with a dot.

    Raises:
        ConfigurationError: A folder cannot be listed, or a link leads nowhere.
    """
    found: list[Path] = []
    links: list[Path] = []
    walked: dict[Path, Path] = {}
    _walk(folder, leave_out, hidden, found, links, walked)
    while links:
        link = links.pop(0)
        real = _real(link)
        if _real(link.parent).is_relative_to(real):
            leave_out(link, "a link back to a folder that it lies in")
        elif real in walked:
            leave_out(link, again(walked[real]))
        else:
            _walk(link, leave_out, hidden, found, links, walked)
    return sorted(_each_once(found, leave_out))


def _walk(
    folder: Path,
    leave_out: LeaveOut,
    hidden: bool,
    found: list[Path],
    links: list[Path],
    walked: dict[Path, Path],
) -> None:
    walked[_real(folder)] = folder
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as reason:
        raise ConfigurationError(f"the folder '{folder}' cannot be read: {reason.strerror}") from None
    for entry in entries:
        path = folder / entry.name
        if entry.name.startswith(".") and not hidden:
            leave_out(path, "hidden")
        elif entry.is_symlink() and _real(path).is_dir():
            links.append(path)
        elif entry.is_dir():
            if (real := _real(path)) in walked:  # a link has led here before
                leave_out(path, again(walked[real]))
            else:
                _walk(path, leave_out, hidden, found, links, walked)
        elif _real(path).is_file():
            found.append(path)
        else:
            leave_out(path, "a socket, a pipe or a device")


def _real(path: Path) -> Path:
    try:
        return path.resolve(strict=True)
    except (OSError, RuntimeError) as reason:  # a link that leads nowhere, or round and round
        why = getattr(reason, "strerror", None) or reason
        raise ConfigurationError(f"'{path}' cannot be read: {why}") from None


def file_identity(path: Path) -> object:
    """Equal for two paths of one file, by links of either kind."""
    status = path.stat()
    # Where a file has one name, its number need not be unique: some network file systems give none.
    return (status.st_dev, status.st_ino) if status.st_nlink > 1 else path.resolve()


def _each_once(paths: list[Path], leave_out: LeaveOut) -> list[Path]:
    """A file's own path is kept before a link to it."""
    kept: dict[object, Path] = {}
    for path in sorted(paths, key=lambda path: path.is_symlink()):
        if (first := kept.setdefault(file_identity(path), path)) != path:
            leave_out(path, again(first))
    return list(kept.values())
