"""Find which rank of a job on this machine failed first, why it did, and where its log is."""

import functools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nemo_run as run
from torchx.specs import AppState

_ROOT_CAUSE = re.compile(
    r"Root Cause.*?rank\s*:\s*(?P<rank>\d+).*?exitcode\s*:\s*(?P<ending>[^\n]*)", re.DOTALL
)
_TRACEBACK = re.compile(r"Traceback \(most recent call last\):.*\n(?:[ \t].*\n|\n)*(?P<raised>\S.*)")
_CONSEQUENCE = re.compile(
    r"(?i)(connection (closed|reset|refused)|broken pipe|DistBackendError|DistNetworkError|DistStoreError|ChildFailedError"
    r"|SignalException|socket timeout|timed out|gloo|nccl|remote process)"
)
"""Messages of collectives and stores, which break because another rank has failed."""


_HINTS = {
    "results_queue should not be empty": "a process that wrote the checkpoint was killed, as by a machine out of memory"
}
"""Explanations of messages that do not say what has happened."""


@dataclass(frozen=True)
class Failure:
    """The end of the rank of a job that failed first."""

    rank: int | None
    """Number of the rank; None if the job has no ranks."""
    reason: str
    log: Path

    def __str__(self) -> str:
        rank = "" if self.rank is None else f"rank {self.rank} failed first: "
        return f"{rank}{self.reason}; its log is {self.log}"


def first_failure(job_dir: Path) -> Failure | None:
    """Return what ended a job of NeMo-Run's local executor, from the logs in its folder; None if there are none."""
    ranks = {int(log.parent.name): log for log in _latest(job_dir, "torchelastic/*/*/attempt_*/*/stderr.log")}
    outer = _latest(job_dir, "*/[0-9]*/stderr.log")
    if not ranks:
        return next((Failure(None, _raised(log) or _last_line(log), log) for log in outer), None)
    raised = {rank: _raised(log) for rank, log in ranks.items()}
    causes = [rank for rank, reason in raised.items() if reason and not _CONSEQUENCE.search(reason)]
    told = [found for log in outer for found in _ROOT_CAUSE.finditer(_read(log))]
    root = next((int(found["rank"]) for found in told), min(ranks))
    # torchrun's order is that in which it looked: a rank that was told by its partner's end may come first.
    first = (
        root if root in causes or not causes else min(causes, key=lambda rank: ranks[rank].stat().st_mtime_ns)
    )
    ending = told[0]["ending"].strip() if told and first == root else "unknown"
    return Failure(first, raised[first] or f"exit code {ending}, {_last_line(ranks[first])}", ranks[first])


def _latest(job_dir: Path, pattern: str) -> list[Path]:
    """Return the logs of the last attempt. NeMo-Run keeps a folder for each attempt."""
    found: dict[Path, list[Path]] = {}
    for log in job_dir.glob(f"nemo_run/*/{pattern}"):
        found.setdefault(log.parent.parent, []).append(log)
    newest = max(found, key=lambda folder: folder.stat().st_mtime_ns, default=None)
    return sorted(found[newest]) if newest else []


def _raised(log: Path) -> str:
    """Return the exception that a log ends with, or an empty text."""
    tracebacks = [found["raised"] for found in _TRACEBACK.finditer(_read(log))]
    own = [raised for raised in tracebacks if not raised.startswith("torch.distributed.elastic")]
    reason = re.sub(r"^(?:\w+\.)*(\w+: )", r"\1", (own or [""])[-1])
    return next((f"{reason} ({hint})" for message, hint in _HINTS.items() if message in reason), reason)


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in _read(log).splitlines() if line.strip()]
    return f"after {lines[-1]!r}" if lines else "without a word"


def _read(log: Path) -> str:
    text = log.read_text(errors="replace")
    # The marks of torchrun, "[default0]:", and of an exception after the process groups are made, "[rank0]: ".
    return re.sub(r"^(?:\[\w+\]: ?)+", "", text, flags=re.MULTILINE)


ended: list[str] = []
"""Sentences for all jobs that failed, in the order in which their experiments ended, after `install` was called."""


def install() -> None:
    """Collect in `ended` why jobs failed, because NeMo-Run does not tell."""
    upstream = run.Experiment.__exit__
    if hasattr(upstream, "__wrapped__"):
        return

    @functools.wraps(upstream)
    def leave(self: Any, exc_type: Any, exc_value: Any, tb: Any) -> None:
        upstream(self, exc_type, exc_value, tb)
        ended.extend(failures(self))

    run.Experiment.__exit__ = leave


def failures(experiment: Any) -> list[str]:
    """Return a sentence for every job of an experiment that has failed."""
    ended = [job for job in experiment.jobs if job.state in (AppState.FAILED, AppState.CANCELLED)]
    return [
        f"{job.id} ended as {job.state.name}: {first_failure(Path(job.executor.job_dir)) or 'it has left no log'}"
        for job in ended
    ]
