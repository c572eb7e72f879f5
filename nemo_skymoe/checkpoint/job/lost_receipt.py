"""The receipt of a finished output that is lost or unreadable: found again by doing the job once more beside it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from nemo_skymoe.checkpoint.job.finished import Damage, damaged_files, refused
from nemo_skymoe.checkpoint.tensors.mapping import listed
from nemo_skymoe.checkpoint.tensors.target import Target
from nemo_skymoe.durable.errors import CheckpointError
from nemo_skymoe.durable.files import move, sync, write_small
from nemo_skymoe.durable.receipt import RECEIPT, read_receipt


def is_lost(output: Path, target: Target) -> bool:
    """Say whether a folder has no receipt that can be read, but files as this job writes them.

    Raises:
        ConfigurationError: It has neither, so that nothing speaks for its being an output of this job.
    """
    try:
        if read_receipt(output) is not None:
            return False
    except CheckpointError:
        return True
    if not any((output / file.name).is_file() for file in target.files()):
        raise refused(output, f"it has no {RECEIPT}, and no file of weights that this command writes")
    return True


def adopt(output: Path, again: Path, advance: Callable[[int, str], None]) -> dict[str, Damage]:
    """Give `output` the receipt of `again`, the same job done once more, and the files that are missing from it.

    Without a receipt nothing tells a damaged file from somebody else's, so none that is there is touched.

    Returns:
        What was missing or damaged, the receipt among it.

    Raises:
        CheckpointError: A file of the output is not what the job writes.
    """
    receipt = read_receipt(again)
    assert receipt is not None
    damages = damaged_files(output, receipt, receipt["files"], advance, own=False)
    strange = [
        f"'{output / name}' {damage.reason}" for name, damage in damages.items() if (output / name).exists()
    ]
    if strange:
        raise CheckpointError(
            f"'{output}' has no {RECEIPT} that can be read, and differs from what this command writes:"
            f" {listed(strange)}; move what differs away, then run the same command again"
        )
    for name in damages:
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        move(again / name, output / name)
        sync((output / name).parent)
    write_small(output / RECEIPT, (again / RECEIPT).read_bytes())
    sync(output)
    return damages | {RECEIPT: Damage("is missing or damaged")}
