"""Work that processes share: every task is done once, progress and errors come home, and no worker is left behind."""

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nemo_skymoe.durable.errors import CheckpointError, JobError
from nemo_skymoe.durable.pool import in_threads, share
from tests.cases import every
from tests.waiting import HANG, wait_until

counts = every("workers", [1, 2, 3, 9])


def told(tasks: list[Any], work: Callable[..., None], workers: int) -> list[tuple[Any, ...]]:
    """What the workers tell, in the order in which it arrives."""
    heard: list[tuple[Any, ...]] = []
    share(tasks, work, workers, lambda *message: heard.append(message))
    return heard


@counts
def test_every_task_is_done_once_and_one_after_the_other_in_its_process(workers: int):
    def work(tasks: Iterator[int], tell: Callable[..., None]) -> None:
        for task in tasks:
            tell(task, "begun", os.getpid())
            tell(task, "done", os.getpid())

    heard = told(list(range(20)), work, workers)
    for process in {process for *_, process in heard}:
        own = [message[:2] for message in heard if message[2] == process]
        assert own == [
            (task, state) for task in sorted({task for task, _ in own}) for state in ("begun", "done")
        ]
    assert sorted(task for task, state, _ in heard if state == "done") == list(range(20))
    assert (os.getpid() in {process for *_, process in heard}) == (workers == 1)


def test_progress_arrives_while_a_task_runs(tmp_path: Path):
    def work(tasks: Iterator[int], tell: Callable[..., None]) -> None:
        for task in tasks:
            tell(task)
            wait_until("the parent's answer", (tmp_path / str(task)).exists)

    share([0, 1], work, 2, lambda task: (tmp_path / str(task)).touch())
    assert {file.name for file in tmp_path.iterdir()} == {"0", "1"}


@every(
    ("die", "how"),
    [(lambda: os._exit(3), "exit code 3"), (lambda: os.kill(os.getpid(), signal.SIGKILL), "SIGKILL")],
)
def test_a_dead_worker_is_named_and_the_others_end(die: Callable[[], None], how: str):
    def work(tasks: Iterator[int], tell: Callable[..., None]) -> None:
        for task in tasks:
            if task == 1:
                die()
            time.sleep(24 * 3600.0)

    with pytest.raises(JobError, match=rf"died \({how}\): run the same command again to continue"):
        told([0, 1, 2], work, 3)
    assert multiprocessing.active_children() == []


def test_what_was_told_before_a_death_is_heard():
    def work(tasks: Iterator[int], tell: Callable[..., None]) -> None:
        for task in tasks:
            tell(task)
            os.kill(os.getpid(), signal.SIGKILL)

    heard: list[int] = []
    with pytest.raises(JobError):
        share([0, 1], work, 2, heard.append)
    assert heard


@counts
@every(
    "error", [CheckpointError("'x' is damaged"), OSError(28, "No space", "/x"), ZeroDivisionError("division")]
)
def test_an_error_reaches_the_caller(workers: int, error: Exception):
    def work(tasks: Iterator[int], tell: Callable[..., None]) -> None:
        for _ in tasks:
            raise error

    plain = workers == 1 or not isinstance(error, ZeroDivisionError)
    with pytest.raises(
        type(error) if plain else RuntimeError, match=str(error.args[1 if isinstance(error, OSError) else 0])
    ) as found:
        told([0, 1], work, workers)
    if isinstance(found.value, OSError):
        assert (found.value.errno, found.value.filename) == (28, "/x")


def test_what_cannot_be_pickled_is_no_hindrance():
    """Tasks and functions are inherited."""
    answers = told([lambda: 1, lambda: 2], lambda tasks, tell: [tell(task()) for task in tasks], 2)
    assert sorted(answers) == [(1,), (2,)]


def test_nothing_is_left_behind():
    """Also while somebody still holds the error of a worker."""

    def work(tasks: Iterator[int], tell: Callable[..., None]) -> None:
        for task in tasks:
            tell(task)
            if task == 7:
                raise CheckpointError("'x' is damaged")

    told([0, 1], work, 2)
    gc.collect()  # what other tests have left
    descriptors = os.listdir("/proc/self/fd")
    errors = []
    for _ in range(3):
        told([0, 1], work, 2)
        with pytest.raises(CheckpointError) as error:
            told([6, 7], work, 2)
        errors.append(error)
    assert len(os.listdir("/proc/self/fd")) == len(descriptors)
    assert multiprocessing.active_children() == []


def test_workers_end_with_a_killed_parent(tmp_path: Path):
    body = """
        import os, pathlib, sys, time
        from nemo_skymoe.durable.pool import share
        def work(tasks, tell):
            for task in tasks:
                (pathlib.Path(sys.argv[1]) / str(task)).write_text(str(os.getpid()))
                time.sleep(600)
        share([0, 1], work, 2, print)
    """
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(body), str(tmp_path)])
    files = [tmp_path / "0", tmp_path / "1"]
    wait_until("both workers", lambda: all(file.exists() and file.read_text() for file in files))
    pids = [int(file.read_text()) for file in files]
    parent.kill()
    parent.wait(HANG)

    def ended(pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
        except (FileNotFoundError, ProcessLookupError):
            return True

    wait_until("the end of the workers", lambda: all(map(ended, pids)))


def test_threads_answer_by_item():
    assert in_threads(lambda item: item**2, list(range(50))) == {item: item**2 for item in range(50)}
