"""Writing the files of a target, in this process or in several forked from it, with the same bytes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path

from nemo_skymoe.checkpoint.tensors.model import Weights
from nemo_skymoe.checkpoint.tensors.target import Target, TargetFile
from nemo_skymoe.durable.checksums import FileChecksum
from nemo_skymoe.durable.output_file import OutputFile, Pipeline
from nemo_skymoe.durable.pool import share

_UNSYNCED = 2
"""Files that may be on their way to the disk while the next is written."""

Done = Callable[[str, FileChecksum], None]
Advance = Callable[[int, str], None]
_Tell = Callable[[str, int | FileChecksum], None]
"""Tells of more bytes of a file, or of the checksum of a complete one."""


def write_files(
    target: Target,
    files: Sequence[TargetFile],
    weights: Weights,
    folder: Path,
    *,
    workers: int,
    done: Done,
    advance: Advance,
) -> None:
    """Write `files` of `target` into `folder`.

    Args:
        workers: Processes; one is this one. Each takes the next file when it is free.
        done: Called in this process for each complete file.
        advance: Called in this process with bytes taken and the file's name.

    Raises:
        JobError: A worker process died.
    """

    def work(files: Iterator[TargetFile], tell: _Tell) -> None:
        _write(target, files, weights, folder, tell)

    def told(name: str, news: int | FileChecksum) -> None:
        if isinstance(news, FileChecksum):
            done(name, news)
        else:
            advance(news, name)

    share(files, work, workers, told)


def _write(target: Target, files: Iterator[TargetFile], weights: Weights, folder: Path, tell: _Tell) -> None:
    unsynced: deque[tuple[str, Future[FileChecksum]]] = deque()
    with Pipeline() as pipeline:
        try:
            for file in files:
                unsynced.append((file.name, _write_one(target, file, weights, folder, pipeline, tell)))
                while unsynced and (len(unsynced) > _UNSYNCED or unsynced[0][1].done()):
                    name, finished = unsynced.popleft()
                    tell(name, finished.result())
        except BaseException:
            for name, finished in unsynced:  # what is complete need not be written again
                with suppress(Exception):
                    tell(name, finished.result())
            raise
        for name, finished in unsynced:
            tell(name, finished.result())


def _write_one(
    target: Target, file: TargetFile, weights: Weights, folder: Path, pipeline: Pipeline, tell: _Tell
) -> Future[FileChecksum]:
    path = folder / file.name
    path.parent.mkdir(exist_ok=True, parents=True)
    output = OutputFile(path, pipeline, lambda count: tell(file.name, count))
    try:
        target.write(file, weights, output)
        return output.finish()
    except BaseException:
        output.abandon()
        raise
