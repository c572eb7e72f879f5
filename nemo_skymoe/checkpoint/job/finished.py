"""A job that is run again after it was done: which of its output is there already, and which is missing or damaged."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_skymoe.checkpoint.tensors.mapping import listed
from nemo_skymoe.checkpoint.tensors.regions import FileStorage
from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.durable.checksums import FileChecksum, found_checksums
from nemo_skymoe.durable.errors import CheckpointError
from nemo_skymoe.durable.receipt import RECEIPT, read_receipt, same_receipt

Advance = Callable[[int, str], None]
_WITH_REPAIR = "the same command with --repair"


@dataclass(frozen=True)
class Damage:
    """The damage of a file: what is wrong with it, and its own checksum if it has the size that it was written with."""

    reason: str
    found: FileChecksum | None = None


def finished(
    output: Path, identity: Mapping[str, Any], sources: Sequence[FileStorage], advance: Advance
) -> dict[str, Any]:
    """Return the receipt in `output`, which this job wrote, and from sources that are still the same to the byte.

    The sources are read once more. By which path they are named, and where they lie, does not matter.

    Args:
        identity: What makes two jobs the same, as a `Journal` has it.
        advance: Called with bytes read and a file's name.

    Raises:
        ConfigurationError: The folder is not this job's, with the reason.
    """
    receipt = own_receipt(output, identity)
    if len(receipt["sources"]) != len(sources):
        raise refused(output, f"it was written from {len(receipt['sources'])} sources")
    for storage, written in zip(sources, receipt["sources"], strict=True):
        if (changed := _changed(storage, written["files"], advance)) is not None:
            raise refused(output, f"'{changed}' is not what it was written from")
    return receipt


def own_receipt(output: Path, identity: Mapping[str, Any]) -> dict[str, Any]:
    """Return the receipt in `output`, which this job wrote, from whichever sources. Errors as `finished`."""
    try:
        receipt = read_receipt(output)
    except CheckpointError as reason:
        raise CheckpointError(f"{reason}; {_WITH_REPAIR} puts it back") from None
    expected = json.loads(json.dumps(identity))
    if receipt is None:
        hint = f" (where that alone is lost, {_WITH_REPAIR} puts it back)" if output.is_dir() else ""
        raise refused(output, f"it has no {RECEIPT}{hint}")
    if receipt.get("job") != expected["job"]:
        raise refused(output, _difference(expected["job"], receipt.get("job")))
    if any(receipt.get(key) != value for key, value in expected.items()):
        raise refused(output, "it was written from another configuration or tokenizer")
    return receipt


def _difference(job: Mapping[str, Any], written: Any) -> str:
    """Say in what another job's output differs: its command or version, or the first of its options."""
    if not isinstance(written, dict) or any(
        written.get(name) != job.get(name) for name in ("command", "versions")
    ):
        return "another command or version wrote it"
    mine, other = _flat(job), _flat(written)
    name = next(name for name in (*mine, *other) if mine.get(name) != other.get(name))
    return f"it was written with {name} {other.get(name)!r}, and this command has {mine.get(name)!r}"


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= _flat(value) if isinstance(value, dict) else {name: value}
    return found


def _changed(storage: FileStorage, written: Mapping[str, Any], advance: Advance) -> Path | None:
    """Return a file of a source that is not the one in the receipt."""
    files = {file.relative_to(storage.folder).as_posix(): file for file in storage.files}
    if files.keys() != written.keys():
        return storage.folder / min(files.keys() ^ written.keys())
    claimed = {name: FileChecksum.from_json(value) for name, value in written.items()}
    found = found_checksums(files, claimed, lambda count, name: advance(count, files[name].name))
    return next((files[name] for name in files if found[name] != claimed[name]), None)


def damaged_files(
    output: Path, receipt: Mapping[str, Any], names: Iterable[str], advance: Advance, *, own: bool = True
) -> dict[str, Damage]:
    """Return the files of a finished output that are missing or not the bytes that were written, all of which are read.

    Args:
        receipt: The output's.
        names: Every file that the job writes, its receipt apart.
        own: Whether the receipt is in the output, and its own form is looked at too.

    Raises:
        ConfigurationError: The receipt lists other files.
    """
    written = {name: FileChecksum.from_json(value) for name, value in receipt["files"].items()}
    if written.keys() != set(names):
        raise refused(output, f"its {RECEIPT} lists other files than this command writes")
    found = found_checksums({name: output / name for name in written}, written, advance)
    damages = {
        name: _damage(output / name, written[name], found[name])
        for name in written
        if found[name] != written[name]
    }
    if own and (output / RECEIPT).read_bytes() != same_receipt(receipt, written):
        damages[RECEIPT] = Damage("is not as it was written")
    return damages


def _damage(file: Path, claimed: FileChecksum, found: FileChecksum | None) -> Damage:
    if not file.is_file():
        return Damage("is missing")
    if (size := file.stat().st_size) != claimed.bytes:
        return Damage(f"is {size:,} bytes, expected {claimed.bytes:,}")
    return Damage(f"is not the bytes that {RECEIPT} lists", found)


def refuse_damaged(output: Path, damages: Mapping[str, Damage]) -> CheckpointError:
    """Return the error that names these files and says how to have them written again."""
    problems = [f"'{output / name}' {damage.reason}" for name, damage in damages.items()]
    what = "that file" if len(problems) == 1 else "those files"
    return CheckpointError(
        f"{listed(problems)}: {_WITH_REPAIR} writes {what} again and leaves all others as they are"
    )


def refused(output: Path, reason: str) -> ConfigurationError:
    """Return the error for an output that exists and is not this job's."""
    return ConfigurationError(
        f"'{output}' exists: expected a new folder, or this command's own, but {reason}"
    )
