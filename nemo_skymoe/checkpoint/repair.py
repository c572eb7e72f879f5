"""The damaged files of a finished output, written again one by one; nothing else in the folder is touched."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nemo_skymoe.checkpoint.checksums import FileChecksum
from nemo_skymoe.checkpoint.finished import Damage
from nemo_skymoe.checkpoint.output_file import sync_folder, write_small
from nemo_skymoe.checkpoint.receipt import RECEIPT, same_receipt
from nemo_skymoe.checkpoint.target import Target
from nemo_skymoe.checkpoint.tensors import Weights
from nemo_skymoe.checkpoint.workers import write_files
from nemo_skymoe.config import ConfigurationError


def repaired(
    output: Path,
    damages: Mapping[str, Damage],
    receipt: Mapping[str, Any],
    weights: Weights,
    target: Target,
    small: Mapping[str, bytes],
    workers: int,
    advance: Callable[[int, str], None],
) -> dict[str, Any]:
    """Write the damaged files again, each under another name until it is complete. What is killed is repeated.

    Args:
        output: Finished by this job, from sources that were just found unchanged.
        damages: By path in `output`.
        receipt: The output's.
        small: The content of every file that holds no tensors.

    Returns:
        The receipt. Where a file was intact and the receipt wrong about it, the receipt is written again.

    Raises:
        ConfigurationError: Another process is at it, the disk is too small, or the bytes are not those of the receipt.
    """
    with _lock(output):
        _check_space(output, sum(receipt["files"][name]["bytes"] for name in damages if name != RECEIPT))
        written: dict[str, FileChecksum] = {}
        files = [file for file in target.files() if file.name in damages]
        write_files(target, files, weights, output, workers, written.__setitem__, advance)
        for name in small.keys() & damages.keys():
            (output / name).parent.mkdir(parents=True, exist_ok=True)
            written[name] = write_small(output / name, small[name])
        for folder in {output, *((output / name).parent for name in damages)}:
            sync_folder(folder)
        return _corrected(output, damages, receipt, written)


def _corrected(
    output: Path,
    damages: Mapping[str, Damage],
    receipt: Mapping[str, Any],
    written: Mapping[str, FileChecksum],
) -> dict[str, Any]:
    """The receipt, with the right checksum of files that it alone was wrong about, and written anew if it was edited."""
    claimed = {name: FileChecksum.from_json(value) for name, value in receipt["files"].items()}
    wrong = [name for name in written if written[name] != claimed[name]]
    if not wrong and RECEIPT not in damages:
        return dict(receipt)
    strange = [name for name in wrong if damages[name].found != written[name]]
    if strange:
        raise ConfigurationError(
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
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigurationError(
                f"'{output}' is being written by another process: wait for it, or stop it and run this again"
            ) from None
        yield
    finally:
        os.close(descriptor)


def _check_space(output: Path, needed: int) -> None:
    free = shutil.disk_usage(output).free
    if needed > free:
        raise ConfigurationError(
            f"'{output}' needs {needed / 1e9:.3f} GB for its damaged files, its disk has {free / 1e9:.3f} GB free: make"
            " room, then run the same command again"
        )
