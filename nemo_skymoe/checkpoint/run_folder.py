"""The folder of a run, `dir/name` of a recipe, as NeMo leaves it."""

import os
from pathlib import Path

from nemo_skymoe.durable.errors import CheckpointError
from nemo_skymoe.durable.stand_in import refuse_broken_link

_CHECKPOINTS, _LAST, _UNFINISHED = "checkpoints", "*-last", "-unfinished"
_PARTS = ("weights", "context")


def checkpoint_of(folder: Path) -> Path:
    """Return `folder`, or the last checkpoint of a run, or the whole checkpoint for NeMo's `weights/` or `context/`."""
    # By its name first: `weights` may be a link to another disk, where there is no context beside it.
    for part in (Path(os.path.abspath(folder)), Path(os.path.realpath(folder))):
        if part.name in _PARTS and all((part.parent / name).is_dir() for name in _PARTS):
            return part.parent
    return last_checkpoint(folder) if (folder / _CHECKPOINTS).is_dir() else folder


def last_checkpoint(run: Path) -> Path:
    """Return the last complete checkpoint of a run, from which the run itself would resume.

    Raises:
        CheckpointError: It has none, or one of them is a link that leads nowhere.
    """
    complete = [
        path
        for path in (run / _CHECKPOINTS).glob(_LAST)
        if not path.with_name(path.name + _UNFINISHED).exists()
    ]
    if not complete:
        raise CheckpointError(
            f"'{run / _CHECKPOINTS}' has no {_LAST} that is complete: the run has not saved a checkpoint yet"
        )
    for path in complete:
        refuse_broken_link(path)
    return max(complete, key=lambda path: path.stat().st_mtime)
