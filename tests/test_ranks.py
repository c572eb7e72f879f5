"""`run_ranks`: order, environment, and every way in which a rank can end badly."""

import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from nemo_skymoe import ranks
from nemo_skymoe.ranks import RankFailed, run_ranks
from tests.cases import every
from tests.waiting import HANG, wait_until

FOREVER = (
    24 * 3600.0
)  # seconds: a rank that sleeps so long and is waited for would end in a hang, not in a failure


HERE = {"inherited": False}


def what_is_seen(*names: str) -> tuple[bool, list[str | None]]:
    """Whether this process has what the test has set, and its variables. It prints, before and after its log began."""
    os.write(1, b"into the log\n")
    if ranks.TERMINAL in os.environ:
        os.write(int(os.environ[ranks.TERMINAL]), b"to the terminal\n")
    return HERE["inherited"], [os.environ.get(name) for name in names]


def rank() -> int:
    return int(os.environ["RANK"])


def running(pid: int) -> bool:
    """Whether the process exists at all: a zombie counts."""
    return Path(f"/proc/{pid}").exists()


def alive(pid: int) -> bool:
    """Like `running`, but an orphan that its new parent has yet to reap is over."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def ended(directory: Path, number: int) -> bool:
    """Whether a rank has recorded its process, and is over."""
    file = directory / str(number)
    return file.exists() and (pid := file.read_text()) != "" and not alive(int(pid))


def record_pid(directory: Path) -> None:
    (directory / str(rank())).write_text(str(os.getpid()))


def recorded_pids(directory: Path, count: int) -> list[int]:
    def pids() -> list[int]:
        found = [int(text) for file in directory.iterdir() if (text := file.read_text())]
        return found if len(found) == count else []

    return wait_until(f"{count} ranks", pids)


def test_what_a_rank_left_to_its_threads_is_done(tmp_path: Path) -> None:
    def leave_it_to_a_thread() -> None:
        def write() -> None:
            time.sleep(0.5)  # for a parent that would not wait
            (tmp_path / str(rank())).touch()

        threading.Thread(target=write).start()
        ThreadPoolExecutor(1).submit(int)  # an idle worker, for which nobody has to wait

    run_ranks(leave_it_to_a_thread, 2, timeout=HANG)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["0", "1"]


def test_a_rank_that_is_done_keeps_what_the_others_still_need(tmp_path: Path) -> None:
    """Rank 0 holds the store: without it what rank 1 asks for last ends in "reset by peer"."""

    def ask_late() -> bytes:
        torch.distributed.init_process_group("gloo")
        store = torch.distributed.distributed_c10d._get_default_store()
        if rank() == 0:
            (tmp_path / "done").touch()
            return b""
        wait_until("rank 0", (tmp_path / "done").exists)
        time.sleep(1.0)
        store.set("late", "value")
        return store.get("late")

    assert run_ranks(ask_late, 2) == [b"", b"value"]


def test_results_come_in_rank_order_whoever_ends_first(monkeypatch: pytest.MonkeyPatch):
    wait = ranks.wait

    def last_rank_first(pipes, timeout):
        while len(ready := wait(pipes, timeout)) < len(pipes):
            pass
        return sorted(ready, key=pipes.index, reverse=True)

    monkeypatch.setattr(ranks, "wait", last_rank_first)
    assert run_ranks(lambda base: base + rank() ** 2, 4, 10) == [10, 11, 14, 19]


def test_environment_is_what_torchrun_gives():
    names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "EXTRA"]
    before = dict(os.environ)
    worlds = run_ranks(lambda: [os.environ[name] for name in names], 2, env={"EXTRA": "yes"})
    port = worlds[0][5]
    assert worlds == [[str(r), str(r), "2", "2", "127.0.0.1", port, "yes"] for r in range(2)]
    assert dict(os.environ) == before


def test_gloo_finds_its_world():
    def add() -> torch.Tensor:
        torch.distributed.init_process_group("gloo")
        total = torch.tensor([2.0 ** rank()])
        torch.distributed.all_reduce(total)
        return total

    assert [total.item() for total in run_ranks(add, 3)] == [7.0] * 3


def test_tensors_come_back_equal():
    def tensors() -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(rank())
        large = torch.randn(1000, 1000, generator=generator)  # far beyond a pipe's buffer
        return {
            "large": large,
            "bf16": large[:5].bfloat16(),
            "view": large.t()[3:7, ::2],
            "nan": large[0] / 0.0,
        }

    for r, result in enumerate(run_ranks(tensors, 2)):
        generator = torch.Generator().manual_seed(r)
        large = torch.randn(1000, 1000, generator=generator)
        assert torch.equal(result["large"], large)
        assert torch.equal(result["bf16"], large[:5].bfloat16()) and result["bf16"].dtype == torch.bfloat16
        assert torch.equal(result["view"], large.t()[3:7, ::2])
        torch.testing.assert_close(result["nan"], large[0] / 0.0, rtol=0, atol=0, equal_nan=True)


def test_exception_names_its_rank_and_kills_the_stuck_ones(tmp_path: Path):
    def fail_on_one() -> None:
        record_pid(tmp_path)
        if rank() == 1:
            recorded_pids(tmp_path, 3)
            raise ZeroDivisionError("the reason")
        time.sleep(FOREVER)

    with pytest.raises(
        RankFailed, match=r"^rank 1 of 3 failed:\n(?s:.*)in fail_on_one\n(?s:.*)ZeroDivisionError: the reason"
    ):
        run_ranks(fail_on_one, 3)
    assert not any(running(pid) for pid in recorded_pids(tmp_path, 3))
    assert multiprocessing.active_children() == []


def test_the_cause_is_reported_not_its_consequence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The parent looks when all have reported, and reads the consequences first."""

    def break_the_collective() -> None:
        if rank() != 2:
            wait_until("the end of rank 2", lambda: ended(tmp_path, 2))
        record_pid(tmp_path)
        raise ValueError("cause" if rank() == 2 else "consequence")

    wait = ranks.wait

    def look_late(pipes, timeout):
        for process in multiprocessing.active_children():
            process.join()
        return sorted(wait(pipes, timeout), key=pipes.index)

    monkeypatch.setattr(ranks, "wait", look_late)
    with pytest.raises(RankFailed, match=r"rank 2 of 3 failed:\n(?s:.*)ValueError: cause"):
        run_ranks(break_the_collective, 3)


@every(
    ("die", "how"),
    [(lambda: os._exit(3), "exit code 3"), (lambda: os.kill(os.getpid(), signal.SIGKILL), "SIGKILL")],
)
def test_rank_that_dies_is_named(die, how: str):
    def die_on_one() -> None:
        if rank() == 1:
            die()
        time.sleep(FOREVER)

    with pytest.raises(RankFailed, match=rf"^rank 1 of 2 died without a word \({how}\)$"):
        run_ranks(die_on_one, 2)


def test_exit_is_a_failure():
    with pytest.raises(RankFailed, match=r"^rank 0 of 1 failed:\n(?s:.*)SystemExit: 0"):
        run_ranks(lambda: sys.exit(0), 1)


def test_timeout_names_the_ranks_that_did_not_end(tmp_path: Path):
    def hang() -> None:
        record_pid(tmp_path)
        if rank() != 1:
            time.sleep(FOREVER)

    for seconds in (1, 10, 100):  # a busy machine may need longer to start the rank that does end
        with pytest.raises(RankFailed, match=rf"of 3 did not end within {seconds} s$") as failure:
            run_ranks(hang, 3, timeout=seconds)
        if len(list(tmp_path.iterdir())) == 3 and not str(failure.value).startswith("ranks [0, 1, 2]"):
            break
    assert str(failure.value).startswith("ranks [0, 2] of 3")
    assert not any(running(pid) for pid in recorded_pids(tmp_path, 3))


def test_result_that_does_not_pickle_is_a_failure():
    with pytest.raises(RankFailed, match=r"^rank 0 of 1 failed:\n(?s:.*)pickle"):
        run_ranks(lambda: lambda: None, 1)


def test_nothing_is_left_behind(tmp_path: Path):
    run_ranks(record_pid, 2, tmp_path)
    descriptors = os.listdir("/proc/self/fd")
    for _ in range(3):
        run_ranks(record_pid, 2, tmp_path)
    assert len(os.listdir("/proc/self/fd")) == len(descriptors)
    assert not any(running(pid) for pid in recorded_pids(tmp_path, 2))
    assert multiprocessing.active_children() == []


def test_what_a_rank_prints_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class SlowTerminal:
        def flush(self) -> None:
            time.sleep(0.3)  # for a parent that would not wait, to end this process
            (tmp_path / str(rank())).write_text("flushed")

    def speak() -> None:
        monkeypatch.setattr(sys, "stdout", SlowTerminal())

    run_ranks(speak, 2)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["flushed"] * 2


def script(body: str, *arguments: str, **env: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(body), *arguments], env={**os.environ, **env}
    )


def test_a_threaded_parent_does_not_hang_its_ranks():
    """OpenMP waits forever in a forked child for the threads its parent had."""
    body = """
        import torch
        from nemo_skymoe.ranks import run_ranks
        parallel = lambda: torch.randn(2000, 2000).exp().sum().item()
        parallel()
        assert torch.get_num_threads() == 2
        run_ranks(parallel, 2, timeout=300)
    """
    assert script(body, OMP_NUM_THREADS="2").wait(HANG) == 0


def test_ranks_end_with_a_killed_parent(tmp_path: Path):
    body = """
        import os, pathlib, sys, time
        from nemo_skymoe.ranks import run_ranks
        def stuck():
            (pathlib.Path(sys.argv[1]) / os.environ["RANK"]).write_text(str(os.getpid()))
            time.sleep(600)
        run_ranks(stuck, 2)
    """
    parent = script(body, str(tmp_path))
    pids = recorded_pids(tmp_path, 2)
    parent.kill()
    parent.wait()
    wait_until("the end of the ranks", lambda: not any(alive(pid) for pid in pids), hang=300)


def test_where_gpus_are_visible_ranks_are_not_forked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A pretended GPU: a fork of a process that has asked for one could not use it."""
    monkeypatch.setitem(HERE, "inherited", True)
    names = "RANK", "LOCAL_RANK", "WORLD_SIZE", "SITE"
    for number, visible in enumerate(([], ["NVIDIA A800"])):
        monkeypatch.setattr(ranks.gpus, "visible", lambda visible=visible: visible)
        log = tmp_path / f"{number}.log"
        found = run_ranks(what_is_seen, 2, *names, timeout=HANG, env={"SITE": "here"}, log=log)
        assert found == [(not visible, [str(rank), str(rank), "2", "here"]) for rank in range(2)]
        assert log.read_text().count("into the log") == 2
        assert capfd.readouterr().out == 2 * "to the terminal\n"


def test_what_a_rank_cannot_load_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks.gpus, "visible", lambda: ["NVIDIA A800"])
    with pytest.raises(RankFailed, match=r"rank . of 2 failed:\n(.|\n)*cannot be loaded"):
        run_ranks(print, 2, Unloadable(), timeout=HANG)


class Unloadable:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return _refuse, ("cannot be loaded",)


def _refuse(reason: str) -> None:
    raise ValueError(reason)
