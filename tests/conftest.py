"""What every test module starts from, and what none may leave behind."""

import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nemo_skymoe import gpus, ranks
from nemo_skymoe.patches import unified_memory

unified_memory.apply()  # before any test module imports Megatron
HIDDEN = gpus.hide()  # ranks are forked, and what is compared are numbers of a CPU
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads do not survive the forks of tests
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure() -> None:
    """Where coverage is counted, rank 0 writes what it has counted before its report, which allows it to be killed."""
    if "coverage" not in sys.modules:
        return
    counting, report = sys.modules["coverage"].Coverage, ranks._report

    def saved(writer: Any, function: Any, args: Any) -> None:
        def run(*given: Any) -> Any:
            current = counting.current()
            if current is None:
                return function(*given)
            if os.environ["RANK"] != "0":  # the others run the same lines, and counting takes its time
                current.stop()
            try:
                return function(*given)
            finally:
                current.save()

        report(writer, run, args)

    ranks._report = saved


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say that the tests left GPUs alone, where there are any."""
    if HIDDEN:
        terminalreporter.write_line(f"The tests ran on the CPU: {len(HIDDEN)} GPUs were hidden from them.")


@pytest.fixture(autouse=True, scope="module")
def no_world_in_this_process() -> Iterator[None]:
    """Worlds are forked: gloo's threads in the process they are forked from would make later ones hang."""
    yield
    threads = [task.read_text().strip() for task in Path("/proc/self/task").glob("*/comm")]
    assert not [name for name in threads if "gloo" in name], "a process group was made outside of run_ranks"


@pytest.fixture(autouse=True, scope="module")
def no_handler_is_left() -> Iterator[None]:
    """An experiment of NeMo-Run prints what all others log, which would be in the output of later modules' commands."""
    root = logging.getLogger()
    handlers, level = [*root.handlers], root.level
    yield
    for handler in {*root.handlers} - {*handlers}:
        root.removeHandler(handler)
    root.setLevel(level)
