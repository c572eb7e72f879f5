"""Everything is read once before anything is written: checksums, and a search for NaN and Inf."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from nemo_skymoe.checkpoint.job.known_checksums import Known, known_checksums
from nemo_skymoe.checkpoint.job.scanning import SourceFile, joined, scan, sections
from nemo_skymoe.checkpoint.tensors.mapping import listed
from nemo_skymoe.checkpoint.tensors.regions import Extent, FileStorage
from nemo_skymoe.durable.checksums import FileChecksum
from nemo_skymoe.durable.errors import CheckpointError, JobError
from nemo_skymoe.durable.journal import Journal
from nemo_skymoe.durable.pool import available_processors

Advance = Callable[[int, str], None]


@dataclass(frozen=True)
class _Unread:
    """A file to be read: where its tensors are, its signature beforehand, and what its source says of it."""

    file: Path
    extents: Sequence[Extent]
    signature: list[int]
    known: Known | None

    @property
    def checksum(self) -> FileChecksum | None:
        return self.known[0] if self.known else None

    def sections(self) -> list[tuple[int, int]]:
        return sections(self.file, self.extents, self.checksum)

    def scan(self, section: tuple[int, int], advance: Advance) -> SourceFile:
        name = self.file.name
        return scan(self.file, self.extents, self.checksum, lambda count: advance(count, name), section)


def check_sources(
    sources: Sequence[FileStorage], journal: Journal, allow_nonfinite: bool, advance: Advance
) -> list[dict[str, Any]]:
    """Read every file of every source, unless the journal has it and it has not changed since.

    Returns:
        For the receipt: folder and checksums of every source.

    Raises:
        CheckpointError: A file is not what its source's checksums say, changed since the job began, or has NaN or
            Inf that are not allowed.
    """
    places = {file: storage for storage in sources for file in storage.files}
    checksums = known_checksums(list(places))
    unread = []
    for file, storage in places.items():
        signature = file_signature(file)
        if _place(file) in journal.sources and journal.sources[_place(file)][0] == signature:
            advance(file.stat().st_size, file.name)
        else:
            unread.append(_Unread(file, storage.extents(file), signature, checksums.get(file)))
    _read(unread, journal, advance)
    found = {file: SourceFile.from_json(journal.sources[_place(file)][1]) for file in places}
    _check_finite(found, allow_nonfinite)
    return [
        {
            "folder": os.path.realpath(storage.folder),
            "files": {_name(file, storage): found[file].to_json() for file in storage.files},
        }
        for storage in sources
    ]


def check_same_sources(sources: Sequence[FileStorage], journal: Journal) -> None:
    """Refuse to go on from what was begun from other files: the finished part would be theirs, the rest these'."""
    others = journal.sources.keys() - {_place(file) for storage in sources for file in storage.files}
    if others:
        raise JobError(
            f"'{journal.folder}' was begun from other sources, '{min(others)}' among them: run that command again to"
            " finish it, or delete the folder to start over"
        )


def check_unchanged(sources: Sequence[FileStorage], journal: Journal) -> None:
    """Refuse to finish if a source's file is not the one that was read."""
    for file in {file for storage in sources for file in storage.files}:
        if journal.sources[_place(file)][0] != file_signature(file):
            raise CheckpointError(
                f"'{file}' changed while it was converted: delete '{journal.folder}' to start over"
            )


def file_signature(file: Path) -> list[int]:
    """Changes when a file is written to or replaced."""
    status = file.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ino]


def _read(unread: Sequence[_Unread], journal: Journal, advance: Advance) -> None:
    """Scan files on every core, several sections of one too, and record what is in them."""
    cut = [(each, each.sections()) for each in unread]
    with ThreadPoolExecutor(available_processors()) as pool:
        scanned = pool.map(
            lambda task: task[0].scan(task[1], advance),
            [(each, section) for each, its_sections in cut for section in its_sections],
        )
        try:
            for each, its_sections in cut:
                _record(each, joined(list(islice(scanned, len(its_sections)))), journal)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _record(read: _Unread, found: SourceFile, journal: Journal) -> None:
    """Write into the journal what was read, unless it is not what it should be."""
    file = read.file
    if read.known and found.checksum != read.known[0]:
        raise CheckpointError(
            f"'{file}' is damaged: {_difference(found.checksum, *read.known)}; download or copy it anew"
        )
    if _place(file) in journal.sources and journal.sources[_place(file)][1] != found.to_json():
        raise CheckpointError(
            f"'{file}' has changed since '{journal.folder}' was begun: delete that folder to start over"
        )
    if file_signature(file) != read.signature:
        raise CheckpointError(f"'{file}' changed while it was read: run the same command again")
    journal.add_source(_place(file), read.signature, found.to_json())


def _check_finite(found: Mapping[Path, SourceFile], allow_nonfinite: bool) -> None:
    problems = [
        f"'{name}' in '{file}' has {count:,}"
        for file, source in found.items()
        for name, count in source.nonfinite.items()
    ]
    if problems and not allow_nonfinite:
        raise CheckpointError(
            f"NaN or Inf in the weights, expected finite numbers: {listed(problems)}; --allow-nonfinite keeps them"
        )


def _difference(found: FileChecksum, known: FileChecksum, place: Path) -> str:
    if found.bytes != known.bytes:
        return f"{found.bytes:,} bytes, expected {known.bytes:,} by '{place.name}'"
    for name, part in known.tensors.items():
        if found.tensors[name] != part:
            return f"the sha256 of '{name}' is {found.tensors[name].sha256}, expected {part.sha256} by '{place.name}'"
    return f"its sha256 is {found.sha256}, expected {known.sha256} by '{place.name}'"


def _place(file: Path) -> str:
    """The same from whichever folder the command is run, and by whichever path or link the file is named."""
    return os.path.realpath(file)


def _name(file: Path, storage: FileStorage) -> str:
    return file.relative_to(storage.folder).as_posix()
