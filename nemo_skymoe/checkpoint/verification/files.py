"""The files of a written checkpoint against the checksums in its receipt: headers, indices, and all beside tensors."""

import hashlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from nemo_skymoe.checkpoint.companions import companion_names, find_companions
from nemo_skymoe.durable.errors import CheckpointError
from nemo_skymoe.durable.receipt import RECEIPT, read_receipt

_BLOCK = 1 << 24


def written_receipt(folder: Path) -> dict[str, Any]:
    """Return the receipt of a folder that skymoe wrote.

    Raises:
        CheckpointError: There is none.
    """
    receipt = read_receipt(folder)
    if receipt is None:
        raise CheckpointError(f"'{folder}' has no {RECEIPT}: expected a folder that skymoe wrote")
    return receipt


def file_problems(folder: Path) -> list[str]:
    """Files that are missing, unknown, or not those that were written."""
    listed = written_receipt(folder)["files"]
    written_to = {parent.as_posix() for name in listed for parent in PurePosixPath(name).parents}
    present = {*_present(folder, "", written_to)} - {RECEIPT}
    there = {name for name in listed if (folder / name).is_file()}
    problems = [f"'{name}' is missing" for name in sorted(listed.keys() - there)]
    problems += [f"'{name}' was not written with the rest" for name in sorted(present - listed.keys())]
    for name in sorted(there):
        problems += _file_problems(folder / name, name, listed[name])
    return problems


def _present(folder: Path, name: str, written_to: Collection[str]) -> Iterator[str]:
    """The files and links below `folder / name`, by their names in `folder`.

    A link is followed to a folder that was written to. Any other is itself what is there: it may lead nowhere, back to
    where it lies, or to a whole disk.
    """
    for path in (folder / name).iterdir():
        inner = f"{name}/{path.name}" if name else path.name
        if path.is_dir() and (inner in written_to or not path.is_symlink()):
            yield from _present(folder, inner, written_to)
        else:
            yield inner


def companion_problems(source: Path, target: Path) -> tuple[int, list[str]]:
    """Return the files that travel beside the tensors: how many there are, and those that are not the source's.

    Both folders are read here and now: what the receipt says of them does not matter.
    """
    ours, theirs = _companions(source), _companions(target)
    problems = [
        f"'{name}' is beside the source's weights, but not beside these" for name in sorted(ours - theirs)
    ]
    problems += [f"'{name}' is not beside the source's weights" for name in sorted(theirs - ours)]
    homes = _home(source), _home(target)
    for name in sorted(ours & theirs):
        expected, found = ((home / name).read_bytes() for home in homes if home is not None)
        if expected != found:
            problems.append(f"'{name}' is not the source's, byte for byte")
    return len(ours), problems


def _companions(folder: Path) -> set[str]:
    home = _home(folder)
    return set() if home is None else set(companion_names(home))


def _home(folder: Path) -> Path | None:
    if (folder / "config.json").is_file():
        return folder
    return find_companions(folder if (folder / "run_config.yaml").is_file() else folder / "context")


def _file_problems(path: Path, name: str, written: Mapping[str, Any]) -> list[str]:
    size = path.stat().st_size
    if size != written["bytes"]:
        return [f"'{name}' is {size:,} bytes, was written with {written['bytes']:,}"]
    tensors = written.get("tensors") or {}
    outside = hashlib.sha256()
    problems = []
    with path.open("rb") as file:
        for tensor, (start, length, checksum) in sorted(tensors.items(), key=lambda item: item[1][0]):
            _digest(file, start - file.tell(), outside)
            if _digest(file, length).hexdigest() != checksum:
                problems.append(f"'{tensor}' in '{name}' is not what was written")
        _digest(file, size - file.tell(), outside)
    if outside.hexdigest() != written["sha256"]:
        problems.append(f"'{name}' is not what was written" + (", outside its tensors" if tensors else ""))
    return problems


def _digest(file: Any, count: int, digest: Any = None) -> Any:
    digest = digest or hashlib.sha256()
    while count > 0 and (block := file.read(min(count, _BLOCK))):
        digest.update(block)
        count -= len(block)
    return digest
