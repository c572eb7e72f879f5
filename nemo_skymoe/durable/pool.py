"""Work on every core, in threads of this process or in processes of their own. None of them outlives it."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

from nemo_skymoe.durable.errors import ConfigurationError, JobError

Item = TypeVar("Item")
Result = TypeVar("Result")


def available_processors() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0))


def in_threads(function: Callable[[Item], Result], items: Sequence[Item]) -> dict[Item, Result]:
    """Return the function's result for each item, on every core. This is for functions that mostly read or hash."""
    with ThreadPoolExecutor(available_processors()) as pool:
        return dict(zip(items, pool.map(function, items), strict=True))


def share(
    tasks: Sequence[Item],
    work: Callable[[Iterator[Item], Callable[..., None]], None],
    workers: int,
    tell: Callable[..., None],
) -> None:
    """Let up to `workers` processes do `tasks`. Each of them takes the next task when it is free.

    This is not `ProcessPoolExecutor`: there a task ends before the next begins, so that no disk can be waited for
    meanwhile, nothing is heard of a task before its end, and a worker that dies while it speaks blocks the pipe of all.

    Args:
        work: Called in every process as `work(tasks, tell)`, with the tasks that this process takes.
        workers: Processes; one is this one.
        tell: Called in this process with what a worker calls its own with, in the worker's order.

    Raises:
        JobError: A worker died. What a worker raises is raised here: as it is if it is one of our errors or the
            operating system's, else as a RuntimeError with its traceback.
    """
    if workers == 1 or len(tasks) < 2:
        work(iter(tasks), tell)
        return
    turn: Any = multiprocessing.get_context("fork").Value("l", 0)

    def taken() -> Iterator[Item]:
        while True:
            with turn.get_lock():
                number, turn.value = turn.value, turn.value + 1
            if number >= len(tasks):
                return
            yield tasks[number]

    def run(_: int, writer: Connection) -> None:
        try:
            work(taken(), lambda *message: writer.send(message))
            writer.send(None)
        except BaseException as reason:
            kept = isinstance(reason, ConfigurationError | OSError)
            writer.send(reason if kept else RuntimeError(traceback.format_exc()))

    with started(min(workers, len(tasks)), run) as processes:
        while processes:
            for reader in wait(list(processes)):
                assert isinstance(reader, Connection)
                message = _received(reader, processes[reader])
                if message is None:
                    del processes[reader]
                else:
                    tell(*message)


def _received(reader: Connection, process: BaseProcess) -> tuple[Any, ...] | None:
    """Return what a worker says next, or None when it has ended."""
    try:
        message = reader.recv()
    except (EOFError, OSError):
        raise JobError(
            f"a worker process died ({ending(process)}): run the same command again to continue"
        ) from None
    if isinstance(message, BaseException):
        raise message
    return message


@contextmanager
def started(
    count: int, function: Callable[..., None], *args: Any, fork: bool = True
) -> Iterator[dict[Connection, BaseProcess]]:
    """Call `function(number, writer, *args)` in `count` processes, which are killed at the end of the context.

    It yields the pipes to read from, in the order of the numbers. A fork inherits the function and its arguments. A
    process that is started anew gets them pickled.
    """
    context: Any = multiprocessing.get_context("fork" if fork else "spawn")
    processes: dict[Connection, BaseProcess] = {}
    try:
        for number in range(count):
            reader, writer = context.Pipe(duplex=False)
            processes[reader] = process = context.Process(
                target=_child, args=(function, number, writer, *args)
            )
            process.start()
            writer.close()
        yield dict(processes)
    finally:
        alive = [process for process in processes.values() if process.pid is not None]
        for process in alive:
            process.kill()
        for process in alive:
            process.join()
            process.close()
        for reader in processes:
            reader.close()


def ending(process: BaseProcess) -> str:
    """Say how a process that has closed its pipe ended: by which signal, or with which exit code."""
    process.join(timeout=60.0)  # a busy machine lets it end later
    code = process.exitcode
    return signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"


def _child(function: Callable[..., None], number: int, writer: Connection, *args: Any) -> None:
    _follow_the_parent()
    # Threads do not survive a fork: a parallel region would wait for them forever.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    function(number, writer, *args)
    # Skip interpreter shutdown: it would run the parent's atexit hooks and wait for collectives.
    os._exit(0)


def _follow_the_parent() -> None:
    """Leave Ctrl-C, which reaches every process of a terminal, to the parent, and die with it."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        pr_set_pdeathsig = 1  # <linux/prctl.h>
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
