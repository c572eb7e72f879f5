"""A job's folder: named at the very end, one process at a time, its own work or refused."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nemo_skymoe.durable.checksums import FileChecksum
from nemo_skymoe.durable.errors import ConfigurationError, JobError
from nemo_skymoe.durable.files import write_small
from nemo_skymoe.durable.journal import JOURNAL, Journal
from nemo_skymoe.durable.receipt import RECEIPT, read_receipt, receipt_bytes
from nemo_skymoe.durable.unfinished import absolute, check_space, publish, unfinished
from tests.durable import crash

IDENTITY = {"job": {"command": "copy A B"}}
FILES = {"a": b"1" * 100, "b": b"2" * 200}


def work(
    output: Path, identity: dict[str, Any] = IDENTITY, stop: Callable[[str], None] = lambda _: None
) -> None:
    """Write FILES, each recorded in the journal; `stop` is called before each."""
    with unfinished(output, identity) as journal:
        for name, data in FILES.items():
            stop(name)
            if name not in journal.files:
                write_small(journal.folder / name, data)
                journal.add_file(name, FileChecksum.of(data))
        write_small(journal.folder / RECEIPT, receipt_bytes(identity, [], journal.files))
        publish(journal, output)


def stopping(reason: BaseException, at: str = "b") -> Callable[[str], None]:
    def stop(name: str) -> None:
        if name == at:
            raise reason

    return stop


def test_the_output_appears_at_the_end_alone(tmp_path: Path):
    seen: list[bool] = []
    work(tmp_path / "out", stop=lambda _: seen.append((tmp_path / "out").exists()))
    assert seen == [False, False] and os.listdir(tmp_path) == ["out"]
    receipt = read_receipt(tmp_path / "out")
    assert receipt and list(receipt["files"]) == list(FILES)
    assert {name: (tmp_path / "out" / name).read_bytes() for name in FILES} == FILES


def test_killed_before_any_call_it_ends_with_the_same_bytes(tmp_path: Path):
    expected = crash.uninterrupted(lambda: work(tmp_path / "out"), tmp_path / "out")
    for call in range(expected.calls):
        crash.check(lambda: work(tmp_path / "out"), tmp_path / "out", expected, call=call)


def test_what_is_recorded_is_there_after_an_interruption(tmp_path: Path):
    with pytest.raises(KeyboardInterrupt):
        work(tmp_path / "out", stop=stopping(KeyboardInterrupt()))
    journal = Journal(tmp_path / "out.unfinished", IDENTITY)
    assert journal.files == {"a": FileChecksum.of(FILES["a"])}
    journal.close()
    work(tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"]


def test_a_refusal_keeps_finished_work_and_nothing_else(tmp_path: Path):
    refusal = ConfigurationError("no")
    with pytest.raises(ConfigurationError, match="no"):
        work(tmp_path / "out", stop=stopping(refusal, at="a"))
    assert os.listdir(tmp_path) == []
    with pytest.raises(ConfigurationError, match="no"):
        work(tmp_path / "out", stop=stopping(refusal, at="b"))
    assert set(os.listdir(tmp_path / "out.unfinished")) == {"a", JOURNAL}
    with pytest.raises(ConfigurationError), unfinished(tmp_path / "out", IDENTITY, keep=lambda _: False):
        raise refusal
    assert os.listdir(tmp_path) == []


def test_another_jobs_work_is_refused_and_left_alone(tmp_path: Path):
    with pytest.raises(KeyboardInterrupt):
        work(tmp_path / "out", stop=stopping(KeyboardInterrupt()))
    before = crash.tree(tmp_path)
    with pytest.raises(
        JobError, match=r"holds the unfinished work of another command \(copy A B\): run that one"
    ):
        work(tmp_path / "out", {"job": {"command": "copy C B"}})
    assert crash.tree(tmp_path) == before
    (tmp_path / "mine.unfinished").mkdir()
    (tmp_path / "mine.unfinished" / "thesis.txt").touch()
    with pytest.raises(
        JobError, match="holds files that no command here began: delete the folder to start over"
    ):
        work(tmp_path / "mine")
    assert os.listdir(tmp_path / "mine.unfinished") == ["thesis.txt"]


def test_a_second_process_is_refused(tmp_path: Path):
    errors: list[str] = []

    def second(_: str) -> None:
        errors.append(crash.attempt(lambda: work(tmp_path / "out")).error)

    work(tmp_path / "out", stop=second)
    assert len(errors) == 2 and all("JobError: " in error for error in errors)
    assert all(
        "out.unfinished' is being written by another process: wait for it" in error for error in errors
    )


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "no space left for '/x' .*: make room, then run the same command again to continue"),
        (errno.EROFS, "cannot write '/x': .*; change that, then run the same command again to continue"),
    ],
)
def test_what_the_system_refuses_is_a_sentence(number: int, message: str, tmp_path: Path):
    with pytest.raises(JobError, match=message):
        work(tmp_path / "out", stop=stopping(OSError(number, os.strerror(number), "/x"), at="b"))
    work(tmp_path / "out")


def test_a_torn_line_of_the_journal_is_cut(tmp_path: Path):
    with pytest.raises(KeyboardInterrupt):
        work(tmp_path / "out", stop=stopping(KeyboardInterrupt()))
    file = tmp_path / "out.unfinished" / JOURNAL
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:-1]) + lines[-1][:-5])
    journal = Journal(tmp_path / "out.unfinished", IDENTITY)
    assert journal.files == {} and file.read_bytes() == b"".join(lines[:-1])
    journal.close()


def test_a_disk_that_is_too_small_is_refused(tmp_path: Path):
    check_space(tmp_path, 1)
    with pytest.raises(
        JobError, match=r"needs 1000000000\.000 GB for it, its disk has .* GB free: make room"
    ):
        check_space(tmp_path, 10**18, " for it")


def test_a_place_is_the_same_by_any_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "folder" / "below").mkdir(parents=True)
    (tmp_path / "link").symlink_to("folder")
    (tmp_path / "folder" / "last").symlink_to("elsewhere")
    monkeypatch.chdir(tmp_path)
    for spelling in (
        "folder/out",
        "link/out",
        "link/below/../out",
        "./folder/./out",
        str(tmp_path / "folder/out"),
    ):
        assert absolute(Path(spelling)) == tmp_path / "folder" / "out"
    assert absolute(Path("link/last")) == tmp_path / "folder" / "last"
    assert absolute(Path("link/below/..")) == tmp_path / "folder"
