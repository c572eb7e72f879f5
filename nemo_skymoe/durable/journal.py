"""The folder of an unfinished job. One process at a time works in it, and a journal records what is done."""

from __future__ import annotations

import fcntl
import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_skymoe.durable.checksums import FileChecksum
from nemo_skymoe.durable.errors import JobError
from nemo_skymoe.durable.receipt import read_receipt

JOURNAL = ".journal"


class Journal:
    """A job's folder, locked, with a record of what earlier attempts finished.

    The record is lines of JSON that are appended; a torn last one is cut off. Its entries are claims that have to be
    checked against the files, so they may reach the disk in any order.

    Args:
        folder: The folder, which is made if it does not exist.
        identity: The values that make two jobs the same; anything that JSON can hold.

    Raises:
        JobError: Another process works in the folder, or it is not this job's.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]):
        self.folder = folder
        self.identity: dict[str, Any] = json.loads(json.dumps(identity))
        self.sources: dict[str, tuple[list[int], dict[str, Any]]] = {}
        self.files: dict[str, FileChecksum] = {}
        self._lines = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)
        others = {path.name for path in folder.iterdir()} - {JOURNAL}
        receipt = read_receipt(folder)  # the last attempt ended between its last two steps
        if others and receipt is None and not (folder / JOURNAL).is_file():
            raise _foreign(folder, None)
        self._descriptor = os.open(
            folder / JOURNAL, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666
        )
        try:
            lock(self._descriptor, folder / JOURNAL)
            self._open(receipt, bool(others))
        except BaseException:
            os.close(self._descriptor)
            raise

    def add_source(self, file: str, signature: list[int], found: dict[str, Any]) -> None:
        """Record that a file of the source was read, when it had this signature."""
        self.sources[file] = (signature, found)
        self._append({"source": file, "signature": signature, "found": found})

    def add_file(self, name: str, checksum: FileChecksum) -> None:
        """Record that a file of the target is complete."""
        self.files[name] = checksum
        self._append({"file": name, "checksum": checksum.to_json()})

    def remove(self) -> None:
        """Remove the journal, because the job is done: the folder is now like any other."""
        os.unlink(self.folder / JOURNAL)

    def close(self) -> None:
        """Let another process in."""
        os.close(self._descriptor)

    def _open(self, receipt: dict[str, Any] | None, others: bool) -> None:
        """Take over what is there if it is this job's, and refuse it otherwise."""
        size = os.fstat(self._descriptor).st_size
        entries, intact = _entries(os.pread(self._descriptor, size, 0))
        begun = entries[0] if entries else None
        if not entries and receipt is not None:
            begun = {name: receipt.get(name) for name in self.identity}
        if (others and begun is None) or (begun is not None and begun != self.identity):
            raise _foreign(self.folder, begun)
        os.ftruncate(self._descriptor, intact)
        if entries:
            self._take_over(entries[1:])
            return
        self._append(self.identity)
        for name, checksum in (receipt or {"files": {}})["files"].items():
            self.add_file(name, FileChecksum.from_json(checksum))

    def _take_over(self, entries: list[dict[str, Any]]) -> None:
        for entry in entries:
            if "source" in entry:
                self.sources[entry["source"]] = (entry["signature"], entry["found"])
            else:
                self.files[entry["file"]] = FileChecksum.from_json(entry["checksum"])

    def _append(self, entry: Mapping[str, Any]) -> None:
        line = (json.dumps(entry) + "\n").encode()
        with self._lines:
            while line:
                line = line[os.write(self._descriptor, line) :]


def lock(descriptor: int, file: Path) -> None:
    """Let this process alone work in the folder of an open file, until its descriptor is closed.

    Raises:
        JobError: Another process does.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        current = os.stat(file).st_ino == os.fstat(descriptor).st_ino
    except (BlockingIOError, FileNotFoundError):
        current = False
    if not current:  # or its owner finished between our two looks
        raise JobError(
            f"'{file.parent}' is being written by another process: wait for it, or stop it and run this again"
        )


def _entries(data: bytes) -> tuple[list[dict[str, Any]], int]:
    """Return the lines that were written to their end, and the bytes that they take."""
    entries, intact = [], 0
    for line in data.splitlines(keepends=True):
        try:
            entry = json.loads(line) if line.endswith(b"\n") else None
        except ValueError:
            entry = None
        if not isinstance(entry, dict):
            break
        entries.append(entry)
        intact += len(line)
    return entries, intact


def _foreign(folder: Path, begun: Mapping[str, Any] | None) -> JobError:
    job = begun.get("job") if begun else None
    command = job.get("command") if isinstance(job, dict) else None
    what = "the unfinished work of another command" if begun else "files that no command here began"
    return JobError(
        f"'{folder}' holds {what}{f' ({command})' if command else ''}: "
        + ("run that one again to finish it, or " if begun else "")
        + "delete the folder to start over"
    )
