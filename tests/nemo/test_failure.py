"""A job that failed on this machine: which rank was first, with what, and where that is written."""

import os
from pathlib import Path

from nemo_skymoe.nemo.failure import first_failure

FRAMES = 'Traceback (most recent call last):\n  File "x.py", line 1, in f\n    g()\n    ^^^\n'
LOST = FRAMES + "torch.distributed.DistBackendError: NCCL error: remote process exited\n"
ELASTIC = FRAMES + "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: \n"
WRITER = (
    FRAMES
    + "torch.distributed.checkpoint.api.CheckpointException: CheckpointException ranks:dict_keys([0, 1])\n"
    "Traceback (most recent call last): (RANK 0)\nRuntimeError: results_queue should not be empty\n"
    "Traceback (most recent call last): (RANK 1)\nRuntimeError: results_queue should not be empty\n\n"
)
"""What Megatron raises if one of the processes that write a checkpoint is killed."""
KILLED = "a process that wrote the checkpoint was killed, as by a machine out of memory"


def marked(text: str) -> str:
    """Return an exception as PyTorch prints it once process groups are made."""
    return "".join(f"[rank0]: {line}\n" if line else "\n" for line in text.splitlines())


def root(rank: int, ending: str = "1 (pid: 7) ") -> str:
    failures = "Failures:\n[1]:\n  rank      : 7 (local_rank: 7)\n  exitcode  : -15 (pid: 9)  (SIGTERM)\n"
    return f"{ELASTIC}{failures}Root Cause (first observed failure):\n[0]:\n  host : h\n  rank      : {rank} (local_rank: {rank})\n  exitcode  : {ending}\n"


def job(folder: Path, outer: str, ranks: dict[int, str], attempt: int = 0) -> Path:
    app = folder / "nemo_run" / "training-abc"
    (app / "training" / "0").mkdir(parents=True, exist_ok=True)
    (app / "training" / "0" / "stderr.log").write_text(outer)
    for moment, (rank, text) in enumerate(ranks.items()):
        place = app / "torchelastic" / "training" / "1_x" / f"attempt_{attempt}" / str(rank)
        place.mkdir(parents=True)
        (place / "stderr.log").write_text(text)
        os.utime(place / "stderr.log", (1000 + moment, 1000 + moment))
    return folder


def test_the_cause_and_not_its_consequence(tmp_path: Path) -> None:
    own = (
        "a warning\n"
        + FRAMES
        + "nemo_skymoe.config.ConfigurationError: no corpus in /x\n\nFiddle context: more\n"
    )
    cases = {
        "told by torchrun": (root(1), {0: LOST, 1: own}, 1, "ConfigurationError: no corpus in /x"),
        "told wrongly": (root(0), {0: LOST, 1: own}, 1, "ConfigurationError: no corpus in /x"),
        "both of their own": (root(0), {1: own, 0: FRAMES + "ValueError: 3\n"}, 0, "ValueError: 3"),
        "the earlier of its own": (root(2), {1: FRAMES + "KeyError: 'a'\n", 0: own, 2: LOST}, 1, "KeyError: 'a'"),
        "with torchrun's mark": (root(0), {0: "".join(f"[default0]:{line}\n" for line in own.splitlines())}, 0, "ConfigurationError: no corpus in /x"),
        "with that of the process groups": (root(0), {0: marked(own) + "ERROR: a span is stopped\n"}, 0, "ConfigurationError: no corpus in /x"),
        "with both": (root(0), {0: "".join(f"[default0]:{line}\n" for line in marked(own).splitlines())}, 0, "ConfigurationError: no corpus in /x"),
        "a writer was killed": (root(0), {0: marked(WRITER) + "ERROR: a span is stopped\n"}, 0, f"RuntimeError: results_queue should not be empty ({KILLED})"),
        "the last of a chain": (root(0), {0: FRAMES + "KeyError: 'a'\n\nDuring handling of the above exception, another:\n\n" + own}, 0, "ConfigurationError: no corpus in /x"),
        "killed": (root(1, "-9 (pid: 8)  (SIGKILL)"), {0: LOST, 1: "step 3\n"}, 1, "exit code -9 (pid: 8)  (SIGKILL), after 'step 3'"),
        "killed silently": (root(1, "-11 (pid: 8)  (SIGSEGV)"), {0: "", 1: ""}, 1, "exit code -11 (pid: 8)  (SIGSEGV), without a word"),
    }  # fmt: skip
    for name, (outer, ranks, first, reason) in cases.items():
        folder = job(tmp_path / name.replace(" ", "_"), outer, ranks)
        found = first_failure(folder)
        assert found and (found.rank, found.reason) == (first, reason), name
        assert found.log.read_text() == ranks[first] and f"attempt_0/{first}/" in str(found.log)
        assert str(found) == f"rank {first} failed first: {reason}; its log is {found.log}"


def test_one_process_without_ranks_and_no_log_at_all(tmp_path: Path) -> None:
    folder = job(
        tmp_path, "loading\n" + FRAMES + "nemo_skymoe.config.ConfigurationError: '/x' is not a folder\n", {}
    )
    found = first_failure(folder)
    assert found and str(found).startswith("ConfigurationError: '/x' is not a folder; its log is /")
    assert first_failure(tmp_path / "absent") is None


def test_the_last_attempt_counts(tmp_path: Path) -> None:
    job(tmp_path, root(0), {0: FRAMES + "ValueError: old\n"})
    for folder in tmp_path.glob("nemo_run/*/torchelastic/*/*/attempt_0"):
        os.utime(folder, (1000, 1000))
    found = first_failure(job(tmp_path, root(0), {0: FRAMES + "ValueError: new\n"}, attempt=1))
    assert found and found.reason == "ValueError: new"
