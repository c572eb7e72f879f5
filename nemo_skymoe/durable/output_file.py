"""Files that are written once from start to end, under another name until they are complete and on the disk."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import mmap
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from nemo_skymoe.durable.checksums import FileChecksum, TensorChecksum
from nemo_skymoe.durable.files import TEMPORARY

_BUFFER_SIZE = 8 << 20
_BUFFERS = 4
"""Number of buffers that wait for the disk while the next tensor is being read."""
_DIRECT = 1 << 20
"""Shorter writes go through the page cache. Longer ones go past it, which costs half the processor's time."""
_ALIGNMENT = 4096


class Pipeline:
    """The threads of one process that hash, write and sync while its next tensor is being read.

    At most one tensor is still being hashed while the next is assembled: memory stays bounded by the largest ones.
    """

    def __init__(self) -> None:
        self._hashing, self._writing, self._syncing = (ThreadPoolExecutor(count) for count in (1, 1, 2))
        self._hashed: Future[str] | None = None
        self._buffers = [memoryview(new_memory(_BUFFER_SIZE)) for _ in range(_BUFFERS)]
        self._written: list[Future[None] | None] = [None] * _BUFFERS
        self._turn = 0

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *_: object) -> None:
        for pool in (self._hashing, self._writing, self._syncing):
            pool.shutdown(cancel_futures=True)

    def sha256(self, data: memoryview) -> Future[str]:
        """Hash a tensor's memory, which must not change until the result is there."""
        if self._hashed is not None:
            wait([self._hashed])
        self._hashed = self._hashing.submit(lambda: hashlib.sha256(data).hexdigest())
        return self._hashed

    def buffer(self) -> memoryview:
        """Return memory to fill and to hand to `write`. The buffers take turns."""
        written = self._written[self._turn]
        if written is not None:
            wait([written])
        return self._buffers[self._turn]

    def write(self, descriptor: int, size: int) -> Future[None]:
        """Write the first `size` bytes of the current buffer to a file, after those before it."""
        future = self._writing.submit(_write_out, descriptor, self._buffers[self._turn][:size])
        self._written[self._turn] = future
        self._turn = (self._turn + 1) % _BUFFERS
        return future

    def sync(self, function: Callable[[], FileChecksum]) -> Future[FileChecksum]:
        """Run the end of a file's life."""
        return self._syncing.submit(function)


class OutputFile:
    """A file for `torch.save` or anything else that writes from start to end.

    Args:
        path: The path at which the file appears when everything is written and synced. Until then it has the suffix
            ".tmp".
        pipeline: The pipeline, which is shared by the files that a process writes one after the other.
        advance: Called from time to time with the number of further bytes that were taken.
    """

    def __init__(self, path: Path, pipeline: Pipeline, advance: Callable[[int], None]):
        self.path, self._pipeline, self._advance = path, pipeline, advance
        self._temporary = path.with_name(path.name + TEMPORARY)
        self._descriptor = _open(self._temporary)
        self._rest = hashlib.sha256()
        self._tensors: dict[str, tuple[int, int, Future[str]]] = {}
        self._writes: list[Future[None]] = []
        self._size, self._filled = 0, 0

    def write(self, data: Any) -> int:
        """Write bytes that do not belong to a tensor."""
        view = memoryview(data).cast("B")
        self._rest.update(view)
        self._append(view)
        return len(view)

    def flush(self) -> None:
        """Do nothing, because `finish` does it."""

    def write_tensor(self, name: str, data: memoryview) -> None:
        """Write a tensor's bytes, which get a checksum of their own under this name."""
        self._tensors[name] = (self._size, len(data), self._pipeline.sha256(data))
        self._append(data)

    def finish(self) -> Future[FileChecksum]:
        """Sync the file and give it its name, in another thread."""
        if self._filled:
            self._flush()
        return self._pipeline.sync(self._finish)

    def abandon(self) -> None:
        """Leave nothing behind, because something failed."""
        wait(self._writes)
        os.close(self._descriptor)
        self._temporary.unlink(missing_ok=True)

    def _append(self, data: memoryview) -> None:
        self._size += len(data)
        while data:
            buffer = self._pipeline.buffer()
            part = data[: _BUFFER_SIZE - self._filled]
            buffer[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            data = data[len(part) :]
            if self._filled == _BUFFER_SIZE:
                self._flush()

    def _flush(self) -> None:
        if self._writes and self._writes[-1].done():
            self._writes[-1].result()  # a full disk ends the job at once
        self._writes.append(self._pipeline.write(self._descriptor, self._filled))
        self._advance(self._filled)
        self._filled = 0

    def _finish(self) -> FileChecksum:
        try:
            for written in self._writes:
                written.result()
            os.fsync(self._descriptor)
        finally:
            os.close(self._descriptor)
        os.replace(self._temporary, self.path)
        tensors = {
            name: TensorChecksum(start, size, digest.result())
            for name, (start, size, digest) in self._tensors.items()
        }
        return FileChecksum(self._size, self._rest.hexdigest(), tensors)


def _open(path: Path) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
    try:
        return os.open(path, flags | getattr(os, "O_DIRECT", 0), 0o666)
    except OSError as reason:
        if reason.errno != errno.EINVAL:  # the file system cannot
            raise
        return os.open(path, flags, 0o666)


def _write_out(descriptor: int, data: memoryview) -> None:
    aligned = len(data) - len(data) % _ALIGNMENT
    if aligned >= _DIRECT:
        _write_all(descriptor, data[:aligned])
        data = data[aligned:]
    if data:
        _through_cache(descriptor)
        _write_all(descriptor, data)


def _write_all(descriptor: int, data: memoryview) -> None:
    while data:
        try:
            data = data[os.write(descriptor, data) :]
        except OSError as reason:
            # Where a direct write is refused, or was cut short at an odd place.
            if reason.errno != errno.EINVAL or not _through_cache(descriptor):
                raise


def _through_cache(descriptor: int) -> bool:
    """Leave direct mode, and say whether the file was in it."""
    flags, direct = fcntl.fcntl(descriptor, fcntl.F_GETFL), getattr(os, "O_DIRECT", 0)
    fcntl.fcntl(descriptor, fcntl.F_SETFL, flags & ~direct)
    return bool(flags & direct)


def new_memory(size: int) -> mmap.mmap:
    """Return memory that begins at a page and is this process's own: forked writers must not share kept memory."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):  # a fault for every 2 MB, not for every 4 KB
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory
