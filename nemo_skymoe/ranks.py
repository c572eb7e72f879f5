"""Run a function on several local ranks, which are forked from this process unless they may use GPUs.

A fork inherits everything already imported, so a second world of NeMo processes starts in milliseconds instead of the
20 seconds that its import takes. CUDA forbids it: a process that has only counted GPUs can fork none that uses one.
The ranks see the environment that `torchrun` would give them.
"""

import os
import pickle
import random
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from nemo_skymoe import gpus
from nemo_skymoe.durable.pool import ending, started
from nemo_skymoe.output import redirect_output

TERMINAL = "SKYMOE_TERMINAL"
"""The variable of a rank with a log: the descriptor of the standard output that it had before."""


class RankFailed(RuntimeError):
    """A rank raised an exception, died, or ran out of time. The message names it."""


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
    log: Path | None = None,
) -> list[Any]:
    """Call `function(*args)` on every rank of a new world and return the results in rank order.

    Where GPUs are visible, ranks are started anew, and the function and its arguments have to pickle.

    Args:
        function: Runs in each process, on one thread; what it returns must pickle.
        world_size: Number of ranks on this machine.
        args: Passed to every rank alike.
        timeout: Seconds until the world is killed.
        env: Further environment variables for every rank.
        log: File for everything that the ranks and their imports print; None leaves it to this process's output.

    Raises:
        RankFailed: A rank raised (its traceback is in the message), died, or did not end in time.
            The other ranks are killed first, so nothing is left hanging in a collective.
    """
    fork = not gpus.visible()
    environment = _torchrun_environment(world_size, _free_port()) | (env or {})
    work = (function, args) if fork else pickle.dumps((function, args))
    with started(world_size, _run, environment, log, work, fork=fork) as processes:
        return _collect(processes, timeout)


def _run(rank: int, writer: Connection, environment: dict[str, str], log: Path | None, work: Any) -> None:
    own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    if log is not None:
        own[TERMINAL] = str(os.dup(1))
        redirect_output(log)
    os.environ.update({**own, **environment})
    _report(writer, _call, (work,))


def _call(work: Any) -> Any:
    # Loading imports what the function needs, whose output belongs into the log, and whose errors into the report.
    function, args = pickle.loads(work) if isinstance(work, bytes) else work
    return function(*args)


def _collect(processes: dict[Connection, BaseProcess], timeout: float) -> list[Any]:
    results: list[Any] = [None] * len(processes)
    pipes = {reader: rank for rank, reader in enumerate(processes)}
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
            report = _receive(reader, processes[reader])
            results[rank] = report.value
            if not report.succeeded:
                failures.append((report.moment, rank, report.value))
        if failures:
            # One rank's fault breaks its partners' collectives: the earliest is the cause.
            _, rank, how = min(failures)
            raise RankFailed(f"rank {rank} of {len(processes)} {how}")
    return results


def _receive(reader: Connection, process: BaseProcess) -> _Report:
    try:
        return pickle.loads(reader.recv_bytes())
    except (EOFError, OSError):  # nothing, or half a message
        return _Report(False, f"died without a word ({ending(process)})")


def _report(writer: Connection, function: Callable[..., Any], args: tuple) -> None:
    succeeded = False
    try:
        # Plain pickle: torch would hand tensors over in shared memory that dies with this process.
        message = pickle.dumps(_Report(True, function(*args)))
        # A process that ends by itself waits for its threads too: NeMo removes old checkpoints in one.
        threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue]
        succeeded = True
    except BaseException:
        moment = time.monotonic()  # before the traceback is put together, which reads files
        message = pickle.dumps(_Report(False, f"failed:\n{traceback.format_exc()}", moment))
    # Before the report, which allows the parent to end this process.
    sys.stdout.flush()
    sys.stderr.flush()
    writer.send_bytes(message)
    # Rank 0 keeps the store at which slower ranks still meet, so the parent ends all of them together.
    while succeeded:
        signal.pause()


def _torchrun_environment(world_size: int, port: int) -> dict[str, str]:
    return {
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
    """Return a port below those that the system itself hands out, so that nothing takes it before rank 0 listens."""
    for port in random.SystemRandom().sample(range(20_000, 32_000), 100):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
                return port
            except OSError:
                continue
    raise RankFailed("no free port between 20000 and 32000 for the ranks to meet at")
