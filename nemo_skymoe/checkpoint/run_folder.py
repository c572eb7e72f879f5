"""The folder of a run, as NeMo (`dir/name` of a recipe) or Megatron-Bridge leaves it, and its last checkpoint."""

import os
from pathlib import Path

from nemo_skymoe.durable.errors import CheckpointError
from nemo_skymoe.durable.receipt import RECEIPT, read_receipt
from nemo_skymoe.durable.stand_in import refuse_broken_link

_CHECKPOINTS, _LAST, _UNFINISHED = "checkpoints", "*-last", "-unfinished"
_PARTS = ("weights", "context")
_BRIDGE, _TRACKER = "latest_train_state.pt", "latest_checkpointed_iteration.txt"
_RUN_CONFIG = "run_config.yaml"


def checkpoint_of(folder: Path) -> Path:
    """Return `folder`, or the last checkpoint of a run, or the whole checkpoint for NeMo's `weights/` or `context/`."""
    # By its name first: `weights` may be a link to another disk, where there is no context beside it.
    for part in (Path(os.path.abspath(folder)), Path(os.path.realpath(folder))):
        if part.name in _PARTS and all((part.parent / name).is_dir() for name in _PARTS):
            return part.parent
    for run in (folder, folder / _CHECKPOINTS):
        if (run / _BRIDGE).is_file():
            return _last_iteration(run)
    return last_checkpoint(folder) if (folder / _CHECKPOINTS).is_dir() else folder


def receipt_folder(checkpoint: Path) -> Path:
    """Return the folder where the receipt of a checkpoint lies: of an iteration of Bridge's, the folder above."""
    above = Path(os.path.abspath(checkpoint)).parent
    if (checkpoint / RECEIPT).is_file() or not (above / _BRIDGE).is_file():
        return checkpoint
    files = (read_receipt(above) or {"files": {}})["files"]
    return above if any(name.startswith(f"{checkpoint.name}/") for name in files) else checkpoint


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


def _last_iteration(run: Path) -> Path:
    """Return the iteration that Megatron-Bridge would resume from. Its pickle of the same number is not read.

    Raises:
        CheckpointError: The file that names the iteration is missing or damaged, or the iteration is.
    """
    tracker = run / _TRACKER
    text = tracker.read_text(errors="replace").strip() if tracker.is_file() else None
    if text is None or not text.isascii() or not text.isdecimal():
        found = "is missing" if text is None else f"holds {text[:20]!r}"
        raise CheckpointError(
            f"'{tracker}' {found}, expected the number of an iteration: give the folder of an iteration, iter_..."
        )
    folder = run / f"iter_{int(text):07d}"
    refuse_broken_link(folder)
    if not folder.is_dir():
        raise CheckpointError(f"'{tracker}' names iteration {int(text)}, but there is no '{folder}'")
    if not (folder / _RUN_CONFIG).is_file():
        raise CheckpointError(
            f"'{folder}' has no {_RUN_CONFIG}, which Megatron-Bridge writes last: its save was interrupted, give the"
            " folder of an earlier iteration"
        )
    return folder
