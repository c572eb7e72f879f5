"""List every file below a folder, also through links. Files that are left out or cannot be read are reported."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from nemo_skymoe.config import ConfigurationError

LeaveOut = Callable[[Path, str], None]
"""Called with a file or folder that is left out and the reason, whose details are in brackets."""


def every_file(folder: Path) -> Iterator[Path]:
    """Yield everything below `folder` that is not a folder, as programs see it that follow links: broken links too.

    A folder is entered once, by the path that comes first, so that a circle of links ends. A file with two links to it
    is listed under both.
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
    """Return the reason why a second path to the same file as `first` is left out."""
    return f"read already under another path ({first})"


def files_below(folder: Path, leave_out: LeaveOut, *, hidden: bool = True) -> list[Path]:
    """Return the files below `folder` in the order of their paths, each real file once.

    Links to folders are followed after all real folders, so that a file's own path comes before another that a link
    gives it. A link that leads back to a folder around it is left out, and so is a second path to the same file.

    Args:
        leave_out: Called with every link that is left out, and with hidden files.
        hidden: Whether to list files and folders whose names begin with a dot.

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
    """Return a value that is equal for two paths of one file, by links of either kind."""
    status = path.stat()
    # Where a file has one name, its number need not be unique: some network file systems give none.
    return (status.st_dev, status.st_ino) if status.st_nlink > 1 else path.resolve()


def _each_once(paths: list[Path], leave_out: LeaveOut) -> list[Path]:
    """Keep one path of each file: its own path rather than a link to it."""
    kept: dict[object, Path] = {}
    for path in sorted(paths, key=lambda path: path.is_symlink()):
        if (first := kept.setdefault(file_identity(path), path)) != path:
            leave_out(path, again(first))
    return list(kept.values())
