"""Kill a conversion at any byte or system call, run it again, and compare with one that was left alone.

    expected = crash.uninterrupted(convert)
    for byte in crash.evenly(expected.written, points=20):
        crash.check(convert, output, expected, byte=byte)

`convert` does the whole job, in a process forked from this warmed one; `output` is the folder that it makes.
"""

import os
import shutil
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint.filesystem  # what a job imports, so that its forks need not

from tests.waiting import wait_until

CALLS = ("fsync", "replace", "rename", "unlink", "mkdir", "ftruncate")
"""Of `os`: after any of them the folder looks different."""


@dataclass(frozen=True)
class Run:
    """One attempt: whether it was killed, and what it wrote and called before its end."""

    killed: bool
    written: int = 0
    calls: int = 0
    error: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    """Only of `uninterrupted`: every file of the output."""


def attempt(
    convert: Callable[[], Any],
    byte: int | None = None,
    call: int | None = None,
    seconds: float | None = None,
) -> Run:
    """Run `convert` in a fork of this process; SIGKILL it in the middle of a write, before a call, or at a moment.

    Args:
        byte: Of all bytes written, the last that reaches the file. In a job with workers each process counts.
        call: Number of the first call, of those in CALLS, that does not happen.
        seconds: From the start, for a kill from outside.
    """
    reader, writer = Pipe(duplex=False)
    process = os.fork()
    if process == 0:
        _child(convert, writer, byte, call)
    writer.close()
    if seconds is not None:
        time.sleep(seconds)
        os.kill(process, signal.SIGKILL)
    report: dict[str, Any] = {}
    with suppress(EOFError, OSError):
        report = reader.recv()
    _, status = os.waitpid(process, 0)
    return Run(os.WIFSIGNALED(status), **report)


def uninterrupted(convert: Callable[[], Any], output: Path) -> Run:
    """The job from beginning to end; its output is read and deleted."""
    run = attempt(convert)
    assert not run.killed and not run.error, run.error
    files = tree(output)
    shutil.rmtree(output)
    return Run(False, run.written, run.calls, files=files)


def check(
    convert: Callable[[], Any], output: Path, expected: Run, again: int | None = None, **moment: Any
) -> Run:
    """Kill the job at a moment (see `attempt`), perhaps `again` at a byte, then let it finish; the bytes must be equal.

    Returns:
        The last attempt.
    """
    first = attempt(convert, **moment)
    assert first.killed or "seconds" in moment or not first.error, first.error
    last = first
    if again is not None and not output.exists():
        last = attempt(convert, byte=again)
    if output.exists():
        assert tree(output) == expected.files, "what looked finished was not"
    else:
        last = _to_the_end(convert)
        assert not last.error, last.error
        found = tree(output)
        assert found.keys() == expected.files.keys()
        assert [name for name in found if found[name] != expected.files[name]] == []
    assert not output.with_name(output.name + ".unfinished").exists()
    shutil.rmtree(output)
    return last


def _to_the_end(convert: Callable[[], Any]) -> Run:
    """A killed job's workers hold its lock for another moment."""

    def run() -> Run | None:
        last = attempt(convert)
        return None if "is being written by another process" in last.error else last

    return wait_until("the end of the killed job's workers", run, pause=0.1)


def evenly(total: int, points: int) -> Iterator[int]:
    """Moments spread over bytes or calls, the ends included."""
    return (round(number * (total - 1) / max(1, points - 1)) for number in range(points))


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def _child(convert: Callable[[], Any], writer: Any, byte: int | None, call: int | None) -> None:
    torch.set_num_threads(1)  # OpenMP's workers do not survive a fork
    counts = _count_and_kill(byte, call)
    report: dict[str, Any] = {}
    try:
        convert()
    except BaseException:
        report["error"] = traceback.format_exc()
    writer.send(report | counts)
    os._exit(0)


def _count_and_kill(byte: int | None, call: int | None) -> dict[str, int]:
    """Put ourselves between the program and the system, in this process and what it forks."""
    counts = {"written": 0, "calls": 0}
    turn = threading.RLock()
    system_write = os.write

    def write(descriptor: int, data: Any) -> int:
        with turn:
            if byte is not None and counts["written"] + len(data) > byte:
                with suppress(OSError):
                    system_write(descriptor, memoryview(data)[: byte - counts["written"]])
                os.kill(os.getpid(), signal.SIGKILL)
            count = system_write(descriptor, data)
            counts["written"] += count
            return count

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any, **options: Any) -> Any:
            with turn:
                if counts["calls"] == call:
                    os.kill(os.getpid(), signal.SIGKILL)
                counts["calls"] += 1
            return function(*arguments, **options)

        return called

    os.write = write
    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))
    return counts
