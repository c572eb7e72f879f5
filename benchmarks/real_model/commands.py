"""The commands that a user would type, each as a process with a log, in the folder where all of it happens."""

from __future__ import annotations

import os
import resource
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

BINARIES = Path(sys.executable).parent


@dataclass(frozen=True)
class Finished:
    """A command that has ended: what it printed, how long it took, and the processor time of all its processes."""

    output: str
    seconds: float
    processor_seconds: float


@dataclass(frozen=True)
class Workplace:
    """The folder of checkpoints, corpus, runs and logs. Commands run in it, with paths relative to it."""

    folder: Path

    def run(self, *words: str, may_fail: bool = False) -> Finished:
        """Run `skymoe`, `nemo` or `pip`.

        Raises:
            SystemExit: The command has failed, which it may not. The message has the end of what it printed.
        """
        environment = os.environ | {
            "PATH": f"{BINARIES}:{os.environ['PATH']}",
            "NEMORUN_HOME": str(self.folder / "nemo_run"),
        }
        print("$", shlex.join(words), flush=True)
        before, start = _children(), time.monotonic()
        done = subprocess.run(
            [str(BINARIES / words[0]), *words[1:]],
            cwd=self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        seconds = time.monotonic() - start
        with (self.folder / "commands.log").open("a") as log:
            log.write(f"$ {shlex.join(words)}\n{done.stdout}\n")
        if done.returncode and not may_fail:
            raise SystemExit(f"{shlex.join(words)} ended with {done.returncode}:\n{done.stdout[-3000:]}")
        return Finished(done.stdout, seconds, _children() - before)


def _children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
