"""One conversion from beginning to end: it can be killed at any byte and continued by the same command."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from nemo_skymoe.checkpoint.job.finished import Damage, finished, own_receipt, refuse_damaged
from nemo_skymoe.checkpoint.job.lost_receipt import adopt, is_lost
from nemo_skymoe.checkpoint.job.repair import damaged_output, repaired
from nemo_skymoe.checkpoint.job.source_check import check_same_sources, check_sources, check_unchanged
from nemo_skymoe.checkpoint.job.writing import write_files
from nemo_skymoe.checkpoint.tensors.model import Weights
from nemo_skymoe.checkpoint.tensors.regions import FileStorage
from nemo_skymoe.checkpoint.tensors.target import Target, check_complete
from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.durable.checksums import FileChecksum, found_checksums
from nemo_skymoe.durable.files import sync, write_small
from nemo_skymoe.durable.journal import JOURNAL, Journal
from nemo_skymoe.durable.progress import Progress, ProgressCounter
from nemo_skymoe.durable.receipt import RECEIPT, read_receipt, receipt_bytes
from nemo_skymoe.durable.unfinished import absolute, check_space, publish, unfinished

OnDamage = Callable[[Mapping[str, str]], None]


def run(
    weights: Weights,
    target: Target,
    output: Path,
    *,
    job: Mapping[str, Any],
    sources: Sequence[FileStorage],
    workers: int = 1,
    progress: Progress | None = None,
    allow_nonfinite: bool = False,
    repair: bool = False,
    on_damage: OnDamage | None = None,
) -> dict[str, Any]:
    """Write `weights` in the format `target` as the new folder `output`, or finish what an earlier attempt began.

    Everything happens in `<output>.unfinished`, which is renamed at the very end. Where this job has been done before,
    from sources that have not changed, the output is read and compared with its receipt. A file that is missing, damaged
    or edited is refused, since an edit may be meant; with `repair` it is written again, and nothing else is.

    Args:
        job: What makes this job the same as an earlier one: command, options, seed, versions. Kept in the receipt.
        sources: The storages behind `weights`: every file of theirs is read and checked before anything is written.
        workers: Processes that write.
        progress: Called with bytes done, bytes in all, and a file's name; bytes are those read at first and written.
        allow_nonfinite: Count NaN and Inf in the receipt instead of refusing them.
        repair: Write those files of a finished output again that are not as its receipt lists them. Where the receipt
            itself is lost, everything is written beside the output and compared with it, and the receipt put back.
        on_damage: Told which files of a finished output are written again, each with the reason.

    Returns:
        The receipt, as in `<output>/skymoe_receipt.json`.

    Raises:
        ConfigurationError: The output exists and is not this job's, or there is nothing to repair.
        CheckpointError: The output is not as it was written, or a source is damaged or has changed.
        JobError: The output is being written; the disk is too small, full or read-only; a worker died. What was complete
            stays, and the same command continues.
    """
    output = absolute(output)
    _check_order(output, workers, repair)
    files = {file for storage in sources for file in storage.files}
    counter = ProgressCounter(sum(file.stat().st_size for file in files) + target.bytes, progress)
    lost = repair and is_lost(output, target)
    if os.path.lexists(output) and not lost:
        receipt = finished(output, _identity(job, target), sources, counter.advance)
        damages = _damages(output, receipt, target, counter, repair=repair, on_damage=on_damage)
        return repaired(output, damages, receipt, weights, target, workers=workers, advance=counter.advance)
    check_complete(target.chunks, weights)
    _check_extras(target)
    with unfinished(output, _identity(job, target)) as journal:
        _write(journal, weights, target, sources, counter, workers=workers, allow_nonfinite=allow_nonfinite)
        if lost:
            _compare(journal, output, counter, on_damage)
        else:
            publish(journal, output)
    receipt = read_receipt(output)
    assert receipt is not None
    return receipt


def _check_order(output: Path, workers: int, repair: bool) -> None:
    if workers < 1:
        raise ConfigurationError(f"workers is {workers}, expected at least 1")
    if repair and not os.path.lexists(output):
        raise ConfigurationError(f"there is no '{output}' to repair: leave --repair out to write it")


def _damages(
    output: Path,
    receipt: Mapping[str, Any],
    target: Target,
    counter: ProgressCounter,
    *,
    repair: bool,
    on_damage: OnDamage | None,
) -> Mapping[str, Damage]:
    """Return the files of a finished output that are not as they were written, if they are to be written again."""
    damages = damaged_output(output, receipt, target, counter.advance)
    if damages and not repair:
        raise refuse_damaged(output, damages)
    _tell(on_damage, damages)
    return damages


def _compare(journal: Journal, output: Path, counter: ProgressCounter, on_damage: OnDamage | None) -> None:
    """Put the receipt back that an output has lost, from the same files written beside it, which are deleted then."""
    _tell(on_damage, adopt(output, journal.folder, counter.advance))
    shutil.rmtree(journal.folder)
    sync(output.parent)


def _write(
    journal: Journal,
    weights: Weights,
    target: Target,
    sources: Sequence[FileStorage],
    counter: ProgressCounter,
    *,
    workers: int,
    allow_nonfinite: bool,
) -> None:
    """Complete the folder of the journal: the sources are checked before anything is written, and once more after."""
    check_same_sources(sources, journal)
    _keep_finished(journal, target, counter)
    check_space(journal.folder, target.bytes - sum(kept.bytes for kept in journal.files.values()))
    checked = check_sources(sources, journal, allow_nonfinite, counter.advance)
    files = [file for file in target.files() if file.name not in journal.files]
    write_files(
        target,
        files,
        weights,
        journal.folder,
        workers=workers,
        done=journal.add_file,
        advance=counter.advance,
    )
    check_unchanged(sources, journal)
    _finish(target, journal, checked)


def check_output(output: Path, job: Mapping[str, Any], target: Target) -> None:
    """Refuse an output that exists and that another job wrote, without reading more than its receipt; or has no place."""
    output = absolute(output)
    if os.path.lexists(output):
        own_receipt(output, _identity(job, target))
    place = next(parent for parent in output.parents if os.path.lexists(parent))
    if not place.is_dir():
        raise ConfigurationError(f"'{output}' cannot be written: '{place}' is no folder")


def _tell(on_damage: OnDamage | None, damages: Mapping[str, Damage]) -> None:
    if damages and on_damage is not None:
        on_damage({name: damage.reason for name, damage in damages.items()})


def _check_extras(target: Target) -> None:
    taken = {file.name for file in target.files()} | {RECEIPT, JOURNAL}
    for name in target.extras:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or str(path) != name or name in taken:
            raise ConfigurationError(f"'{name}' cannot be one of the output's further files")


def _identity(job: Mapping[str, Any], target: Target) -> dict[str, Any]:
    """Return the job, and a checksum of everything that decides where which bytes go."""
    table = [
        (file.name, [(chunk.name, target.dtypes[chunk.tensor], repr(chunk.parts)) for chunk in file.chunks])
        for file in target.files()
    ]
    extras = [(name, hashlib.sha256(data).hexdigest()) for name, data in target.extras.items()]
    layout = hashlib.sha256(json.dumps([table, extras]).encode()).hexdigest()
    return {"job": dict(job), "layout": layout}


def _keep_finished(journal: Journal, target: Target, counter: ProgressCounter) -> None:
    """Keep the files of earlier attempts that are complete by their checksums, and delete the rest."""
    folder, claimed = journal.folder, dict(journal.files)
    names = [file.name for file in target.files() if file.name in claimed]
    found = found_checksums({name: folder / name for name in names}, claimed, counter.advance)
    journal.files = kept = {name: claimed[name] for name in names if found[name] == claimed[name]}
    for path in sorted(folder.rglob("*"), reverse=True):
        name = path.relative_to(folder).as_posix()
        if name in kept or name == JOURNAL:
            continue
        if path.is_dir() and not path.is_symlink():
            if not any(path.iterdir()):
                path.rmdir()
        else:
            path.unlink()


def _finish(target: Target, journal: Journal, sources: Sequence[Mapping[str, Any]]) -> None:
    """Everything beside the tensors; the files that make the folder a checkpoint come last."""
    folder = journal.folder
    last = target.last_files({name: checksum.bytes for name, checksum in journal.files.items()})
    for name, data in target.extras.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_small(folder / name, data)
    small = {name: FileChecksum.of(data) for name, data in {**target.extras, **last}.items()}
    files = {file.name: journal.files[file.name] for file in target.files()} | small
    write_small(folder / RECEIPT, receipt_bytes(journal.identity, sources, files))
    for name, data in last.items():
        write_small(folder / name, data)
    for place in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
        sync(place)
