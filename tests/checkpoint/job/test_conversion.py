"""Jobs: what is refused before, during and after; that nothing half-written looks finished; progress and workers."""

import ctypes
import os
import resource
import shutil
import threading
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from nemo_skymoe.architecture import Architecture
from nemo_skymoe.checkpoint.job.conversion import run
from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.durable import output_file
from nemo_skymoe.durable.journal import JOURNAL
from nemo_skymoe.durable.receipt import RECEIPT
from tests.checkpoint.fakes import random_weights
from tests.checkpoint.simple_formats import JOB, TINY, Interrupting, flip, open_folder, target, write
from tests.durable import crash

kinds = pytest.mark.parametrize("kind", ["hf", "torch_dist"])


def unfinished(output: Path) -> Path:
    return output.with_name(output.name + ".unfinished")


def nothing_there(output: Path) -> bool:
    return not output.exists() and not unfinished(output).exists()


@kinds
def test_the_same_bytes_from_any_number_of_workers(kind: str, tmp_path: Path):
    weights = random_weights(TINY)
    for workers in (1, 2, 3):
        write(kind, weights, tmp_path / str(workers), workers=workers)
    assert crash.tree(tmp_path / "1") == crash.tree(tmp_path / "2") == crash.tree(tmp_path / "3")


@kinds
def test_the_same_bytes_past_the_page_cache_and_through_it(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Tensors of several stages, whose ends lie anywhere."""
    weights = random_weights(Architecture(1, 1022, 3000, 2, vocab_size=50, num_moe_experts=2))
    chosen = target(kind, weights)
    run(weights, chosen, tmp_path / "direct", job=JOB, sources=[])
    monkeypatch.setattr(output_file.os, "O_DIRECT", 0)
    run(weights, chosen, tmp_path / "cached", job=JOB, sources=[])
    assert crash.tree(tmp_path / "direct") == crash.tree(tmp_path / "cached")


def test_an_existing_output_is_refused(tmp_path: Path):
    (tmp_path / "out").symlink_to("nowhere")
    with pytest.raises(ConfigurationError, match="exists: expected a new folder"):
        write("hf", random_weights(TINY), tmp_path / "out")


def stopped(kind: str, output: Path, reads: int = 8, **options: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        write(kind, Interrupting(random_weights(TINY), reads, KeyboardInterrupt()), output, **options)


@kinds
def test_an_interrupted_job_leaves_nothing_that_looks_finished(kind: str, tmp_path: Path):
    output, threads = tmp_path / "out", threading.active_count()
    stopped(kind, output)
    assert not output.exists() and threading.active_count() == threads
    left = {Path(name).name for name in crash.tree(unfinished(output))}
    assert left & {RECEIPT, ".metadata", "model.safetensors.index.json", "config.json"} == set()
    assert [name for name in left if name.endswith(".tmp")] == []
    write(kind, random_weights(TINY), output)
    write(kind, random_weights(TINY), tmp_path / "other")
    assert crash.tree(output) == crash.tree(tmp_path / "other")


@kinds
def test_finished_files_are_not_written_again_but_checked(kind: str, tmp_path: Path):
    output = tmp_path / "out"
    stopped(kind, output, reads=13)
    first, second, *_ = sorted(unfinished(output).rglob("*_0.distcp" if kind == "torch_dist" else "model*"))
    names = [path.relative_to(unfinished(output)) for path in (first, second)]
    kept = first.stat()
    flip(second, second.stat().st_size // 2)
    write(kind, random_weights(TINY), output)
    assert (output / names[0]).stat().st_mtime_ns == kept.st_mtime_ns
    assert (output / names[1]).stat().st_mtime_ns > kept.st_mtime_ns
    write(kind, random_weights(TINY), tmp_path / "other")
    assert crash.tree(output) == crash.tree(tmp_path / "other")


@pytest.mark.parametrize(
    "other", [{"job": {"command": "convert A B", "seed": 8}}, {"kind": "torch_dist"}], ids=["job", "target"]
)
def test_the_unfinished_work_of_another_job_is_refused(other: dict[str, Any], tmp_path: Path):
    stopped("hf", tmp_path / "out")
    before = crash.tree(unfinished(tmp_path / "out"))
    kind = other.pop("kind", "hf")
    with pytest.raises(
        ConfigurationError, match=r"out.unfinished' holds .*convert SRC DST.*delete the folder"
    ):
        write(kind, random_weights(TINY), tmp_path / "out", **other)
    assert crash.tree(unfinished(tmp_path / "out")) == before


def test_a_folder_that_no_job_began_is_refused(tmp_path: Path):
    unfinished(tmp_path / "out").mkdir()
    (unfinished(tmp_path / "out") / "model-00001-of-00007.safetensors").write_bytes(b"stale")
    with pytest.raises(ConfigurationError, match="holds files that no command here began: delete the folder"):
        write("hf", random_weights(TINY), tmp_path / "out")
    assert len(crash.tree(tmp_path)) == 1


def test_stale_files_in_a_job_of_ones_own_are_removed(tmp_path: Path):
    stopped("hf", tmp_path / "out")
    (unfinished(tmp_path / "out") / "model-00009-of-00009.safetensors").write_bytes(b"stale")
    (unfinished(tmp_path / "out") / "old").mkdir()
    write("hf", random_weights(TINY), tmp_path / "out")
    write("hf", random_weights(TINY), tmp_path / "other")
    assert crash.tree(tmp_path / "out") == crash.tree(tmp_path / "other")
    assert not (tmp_path / "out" / "old").exists()


def test_a_torn_line_of_the_journal_is_cut(tmp_path: Path):
    stopped("torch_dist", tmp_path / "out")
    journal = unfinished(tmp_path / "out") / JOURNAL
    journal.write_bytes(journal.read_bytes()[:-7] + b"\n\xff")
    write("torch_dist", random_weights(TINY), tmp_path / "out")
    write("torch_dist", random_weights(TINY), tmp_path / "other")
    assert crash.tree(tmp_path / "out") == crash.tree(tmp_path / "other")


def test_a_second_process_is_refused_by_a_lock(tmp_path: Path):
    errors = []

    def second() -> None:
        errors.append(crash.attempt(lambda: write("hf", random_weights(TINY), tmp_path / "out")).error)

    write("hf", Interrupting(random_weights(TINY), 5, second), tmp_path / "out")
    assert "out.unfinished' is being written by another process" in errors[0]
    assert (tmp_path / "out" / RECEIPT).exists()


def test_progress(tmp_path: Path):
    write("hf", random_weights(TINY), tmp_path / "source")
    weights, storage = open_folder("hf", tmp_path / "source")
    for workers in (1, 2):
        calls: list[tuple[int, int, str]] = []
        output = tmp_path / str(workers)
        write(
            "torch_dist",
            weights,
            output,
            [storage],
            workers=workers,
            progress=lambda *call, calls=calls: calls.append(call),
        )
        done = [call[0] for call in calls]
        assert done == sorted(done) and len({call[1] for call in calls}) == 1
        assert done[-1] == pytest.approx(calls[0][1], rel=0.02)


# What the disk refuses.


def test_a_disk_that_is_too_small_is_refused_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=20_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(
        ConfigurationError, match=r"needs 0.000 GB|needs 0\.\d+ GB, its disk has 0.000 GB free"
    ):
        write("hf", random_weights(TINY), tmp_path / "out")
    assert nothing_there(tmp_path / "out")


@kinds
@pytest.mark.parametrize("workers", [1, 2])
def test_a_limit_met_in_the_middle(kind: str, workers: int, tmp_path: Path):
    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2500, 2500))
        write(kind, random_weights(TINY), tmp_path / "out", workers=workers)

    error = crash.attempt(limited).error
    assert "JobError: no space left for" in error and "run the same command again" in error
    assert not (tmp_path / "out").exists()
    write(kind, random_weights(TINY), tmp_path / "out")
    write(kind, random_weights(TINY), tmp_path / "other")
    assert crash.tree(tmp_path / "out") == crash.tree(tmp_path / "other")


def mount_tmpfs(folder: Path, options: str) -> None:
    """For this process alone."""
    libc = ctypes.CDLL(None, use_errno=True)
    new_mount_namespace, private = 0x00020000, 0x44000
    steps = (
        lambda: libc.unshare(new_mount_namespace),
        lambda: libc.mount(b"none", b"/", None, private, None),
        lambda: libc.mount(b"tmpfs", str(folder).encode(), b"tmpfs", 0, options.encode()),
    )
    if any(step() != 0 for step in steps):
        raise NotImplementedError("no mount namespaces here")


@pytest.mark.parametrize(
    ("options", "message"),
    [("size=20k", "no space left for"), ("ro", "Read-only file system")],
)
def test_a_full_or_read_only_disk(options: str, message: str, tmp_path: Path):
    def convert() -> None:
        mount_tmpfs(tmp_path, options)
        if options != "ro":  # as if something else took the space after the first look
            shutil.disk_usage = lambda path: os.statvfs(path) and shutil._ntuple_diskusage(0, 0, 10**9)  # type: ignore[attr-defined]
        try:
            write("torch_dist", random_weights(TINY), tmp_path / "out")
        finally:
            assert not (tmp_path / "out").exists()

    error = crash.attempt(convert).error
    if "NotImplementedError" in error:
        pytest.skip("needs the right to mount")
    assert "JobError" in error and message in error, error


def test_a_folder_that_may_not_be_written():
    with TemporaryDirectory() as place:
        folder = Path(place)
        folder.chmod(0o555)

        def convert() -> None:
            if os.geteuid() == 0:
                os.setuid(65534)
            write("hf", random_weights(TINY), folder / "out")

        assert "JobError: cannot write" in crash.attempt(convert).error
        assert nothing_there(folder / "out")


def test_extras_stay_in_the_folder(tmp_path: Path):
    weights = random_weights(TINY)
    for name in ("../config.json", "/etc/passwd", "a/../b", "model-00001-of-00007.safetensors", RECEIPT):
        chosen: Any = target("hf", weights)
        chosen.extras[name] = b""
        with pytest.raises(ConfigurationError, match="cannot be one of the output's further files"):
            run(weights, chosen, tmp_path / "out", job=JOB, sources=[])
    assert os.listdir(tmp_path) == []
