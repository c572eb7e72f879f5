"""Count and report how far a job has come."""

import threading
from collections.abc import Callable

Progress = Callable[[int, int, str], None]
"""Called with bytes done, bytes in all, and what is being done."""


class ProgressCounter:
    """Counts the bytes done of `total`, from any thread, and reports them to `progress`."""

    def __init__(self, total: int, progress: Progress | None):
        self._done, self._total, self._progress = 0, total, progress
        self._turn = threading.Lock()

    def advance(self, count: int, name: str) -> None:
        """Add bytes that were done of `name`."""
        with self._turn:
            self._done += count
            if self._progress is not None:
                self._progress(min(self._done, self._total), self._total, name)
