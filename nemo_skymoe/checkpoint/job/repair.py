"""The damaged files of a finished output, written again one by one; nothing else in the folder is touched."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nemo_skymoe.checkpoint.job.finished import Damage, damaged_files
from nemo_skymoe.checkpoint.job.writing import write_files
from nemo_skymoe.checkpoint.tensors.model import Weights
from nemo_skymoe.checkpoint.tensors.target import Target
from nemo_skymoe.durable.checksums import FileChecksum
from nemo_skymoe.durable.errors import CheckpointError
from nemo_skymoe.durable.files import sync, write_small
from nemo_skymoe.durable.journal import lock
from nemo_skymoe.durable.receipt import RECEIPT, same_receipt
from nemo_skymoe.durable.unfinished import check_space, plain_errors


def damaged_output(
    output: Path, receipt: Mapping[str, Any], target: Target, advance: Callable[[int, str], None]
) -> dict[str, Damage]:
    """Return by file what is missing from a finished output, or differs from what was written. All of it is read."""
    names = [*(file.name for file in target.files()), *_small(target, receipt)]
    return damaged_files(output, receipt, names, advance)


def _small(target: Target, receipt: Mapping[str, Any]) -> dict[str, bytes]:
    """Return the content of every file without tensors, as far as the receipt has the sizes that it depends on."""
    written = receipt["files"]
    sizes = {file.name: written[file.name]["bytes"] for file in target.files() if file.name in written}
    complete = len(sizes) == len(target.files())
    return {**target.extras, **(target.last_files(sizes) if complete else {})}


def repaired(
    output: Path,
    damages: Mapping[str, Damage],
    receipt: dict[str, Any],
    weights: Weights,
    target: Target,
    *,
    workers: int,
    advance: Callable[[int, str], None],
) -> dict[str, Any]:
    """Write the damaged files again, each under another name until it is complete. What is killed is repeated.

    Args:
        output: Finished by this job, from sources that were just found unchanged.
        damages: By path in `output`.
        receipt: The output's.

    Returns:
        The receipt. Where a file was intact and the receipt wrong about it, the receipt is written again.

    Raises:
        JobError: Another process is at it, or the disk is too small.
        CheckpointError: The bytes are not those of the receipt.
    """
    if not damages:
        return receipt
    small = _small(target, receipt)
    with plain_errors(output), _lock(output):
        needed = sum(receipt["files"][name]["bytes"] for name in damages if name != RECEIPT)
        check_space(output, needed, " for its damaged files")
        written: dict[str, FileChecksum] = {}
        files = [file for file in target.files() if file.name in damages]
        write_files(
            target, files, weights, output, workers=workers, done=written.__setitem__, advance=advance
        )
        for name in small.keys() & damages.keys():
            (output / name).parent.mkdir(parents=True, exist_ok=True)
            write_small(output / name, small[name])
            written[name] = FileChecksum.of(small[name])
        for folder in {output, *((output / name).parent for name in damages)}:
            sync(folder)
        return _corrected(output, damages, receipt, written)


def _corrected(
    output: Path,
    damages: Mapping[str, Damage],
    receipt: Mapping[str, Any],
    written: Mapping[str, FileChecksum],
) -> dict[str, Any]:
    """Return the receipt with the right checksums of files that only it was wrong about, anew if it was edited."""
    claimed = {name: FileChecksum.from_json(value) for name, value in receipt["files"].items()}
    wrong = [name for name in written if written[name] != claimed[name]]
    if not wrong and RECEIPT not in damages:
        return dict(receipt)
    strange = [name for name in wrong if damages[name].found != written[name]]
    if strange:
        raise CheckpointError(
            f"'{output / strange[0]}' was written again with other bytes than {RECEIPT} lists: one of its sources"
            f" changed meanwhile, or the receipt is damaged; delete '{output}' to start over"
        )
    files = claimed | {name: written[name] for name in wrong}
    write_small(output / RECEIPT, same_receipt(receipt, files))
    return {**receipt, "files": {name: checksum.to_json() for name, checksum in files.items()}}


@contextmanager
def _lock(output: Path) -> Iterator[None]:
    """One process at a time, by a lock on the receipt."""
    descriptor = os.open(output / RECEIPT, os.O_RDONLY | os.O_CLOEXEC)
    try:
        lock(descriptor, output / RECEIPT)
        yield
    finally:
        os.close(descriptor)
