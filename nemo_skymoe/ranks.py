"""Run a function on several local ranks, forked from this process.

A fork inherits everything already imported, so a second world of NeMo processes starts in
milliseconds instead of the 20 seconds that its import takes. The ranks see the environment
that `torchrun` would give them.
"""

import ctypes
import multiprocessing
import os
import pickle
import random
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any


class RankFailed(RuntimeError):
    """A rank raised, died or ran out of time; the message names it."""


@dataclass(frozen=True)
class _Report:
    """What a rank sends home: its result, or how it ended and when (seconds of the shared clock)."""

    succeeded: bool
    value: Any
    moment: float = 0.0


def run_ranks(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = 1800.0,
    env: dict[str, str] | None = None,
) -> list[Any]:
    """Call `function(*args)` on every rank of a new world and return the results in rank order.

    Args:
        function: Runs in each forked process, on one thread; what it returns must pickle.
        world_size: Number of ranks on this machine.
        args: Passed to every rank alike.
        timeout: Seconds until the world is killed.
        env: Further environment variables for every rank.

    Raises:
        RankFailed: A rank raised (its traceback is in the message), died, or did not end in time.
            The other ranks are killed first, so nothing is left hanging in a collective.
    """
    fork = multiprocessing.get_context("fork")
    port = _free_port()
    processes: list[BaseProcess] = []
    pipes: dict[Connection, int] = {}
    try:
        for rank in range(world_size):
            reader, writer = fork.Pipe(duplex=False)
            variables = {**_torchrun_environment(rank, world_size, port), **(env or {})}
            process = fork.Process(target=_child, args=(writer, variables, function, args))
            processes.append(process)
            process.start()
            writer.close()
            pipes[reader] = rank
        return _collect(pipes, processes, timeout)
    finally:
        started = [process for process in processes if process.pid is not None]
        for process in started:
            process.kill()
        for process in started:
            process.join()


def _collect(pipes: dict[Connection, int], processes: list[BaseProcess], timeout: float) -> list[Any]:
    results: list[Any] = [None] * len(processes)
    deadline = time.monotonic() + timeout
    while pipes:
        ready = wait(list(pipes), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RankFailed(
                f"ranks {sorted(pipes.values())} of {len(processes)} did not end within {timeout:g} s"
            )
        failures: list[tuple[float, int, str]] = []
        for reader in ready:
            assert isinstance(reader, Connection)
            rank = pipes.pop(reader)
            report = _receive(reader, processes[rank])
            results[rank] = report.value
            if not report.succeeded:
                failures.append((report.moment, rank, report.value))
        if failures:
            # One rank's fault breaks its partners' collectives: the earliest is the cause.
            _, rank, ending = min(failures)
            raise RankFailed(f"rank {rank} of {len(processes)} {ending}")
    return results


def _receive(reader: Connection, process: BaseProcess) -> _Report:
    try:
        return pickle.loads(reader.recv_bytes())
    except (EOFError, OSError):  # nothing, or half a message
        process.join(timeout=60.0)  # it has closed its pipe; a busy machine lets it end later
        code = process.exitcode
        how = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
        return _Report(False, f"died without a word ({how})")


def _child(writer: Connection, env: dict[str, str], function: Callable[..., Any], args: tuple) -> None:
    _follow_the_parent()
    os.environ.update(env)
    if "torch" in sys.modules:
        # OpenMP's workers do not survive a fork: a parallel region would wait for them forever.
        sys.modules["torch"].set_num_threads(1)
    try:
        # Plain pickle: torch would hand tensors over in shared memory that dies with this process.
        message = pickle.dumps(_Report(True, function(*args)))
    except BaseException:
        moment = time.monotonic()  # before the traceback is put together, which reads files
        message = pickle.dumps(_Report(False, f"failed:\n{traceback.format_exc()}", moment))
    # Before the report, which allows the parent to end this process.
    sys.stdout.flush()
    sys.stderr.flush()
    writer.send_bytes(message)
    # Skip interpreter shutdown: it would run the parent's atexit hooks and wait for collectives.
    os._exit(0)


def _follow_the_parent() -> None:
    """Leave Ctrl-C, which reaches every process of a terminal, to the parent, and die with it."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        pr_set_pdeathsig = 1  # <linux/prctl.h>
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def _torchrun_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        # What makes Lightning take these ranks as launched already.
        "TORCHELASTIC_RUN_ID": "local",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_MAX_RESTARTS": "0",
    }


def _free_port() -> int:
    """A port below those that the system itself hands out, so that nothing takes it before rank 0 listens."""
    for port in random.SystemRandom().sample(range(20_000, 32_000), 100):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
                return port
            except OSError:
                continue
    raise RankFailed("no free port between 20000 and 32000 for the ranks to meet at")
