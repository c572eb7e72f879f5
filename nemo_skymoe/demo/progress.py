"""Show the progress of a training in the terminal, while everything that libraries print goes to a log file."""

import os
from time import monotonic

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from nemo_skymoe.demo.record import minutes
from nemo_skymoe.ranks import TERMINAL

_LINES = 10
_FIRST = 3  # a step or two are no measure: the first one allocates


class Bar:
    """Step, loss and time left, which rank 0 writes to the terminal that the story was started from.

    Args:
        title: Name of the training.
        later: Length of everything after this training, as a number of its steps that would take as long.
    """

    def __init__(self, title: str, later: float = 0.0) -> None:
        self.title = title
        self.later = later
        self._progress: Progress | None = None
        self._steps = 0
        self._begin = 0.0

    def start(self, steps: int) -> None:
        """Draw the bar of a training of so many steps."""
        terminal = int(os.environ.get(TERMINAL, "1"))
        console = Console(file=os.fdopen(os.dup(terminal), "w"))
        self._steps = steps
        self._progress = Progress(
            TextColumn("  {task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}{task.fields[left]}"),
            console=console,
            disable=not console.is_terminal,
            refresh_per_second=4,
        )
        self._task = self._progress.add_task(self.title, total=steps, loss="-", left="")
        self._progress.start()

    def move(self, step: int, value: float | None) -> None:
        """Move the bar to a step and its loss. If the terminal is a file, print a line from time to time."""
        if self._progress is None:
            return
        loss = "-" if value is None else f"{value:.3f}"
        left = self._left(step)
        self._progress.update(self._task, completed=step, loss=loss, left=left)
        console = self._progress.console
        every = max(1, self._steps // _LINES)
        if not console.is_terminal and (step == _FIRST or (step > _FIRST and step % every == 0)):
            console.print(f"  {self.title}: step {step}/{self._steps}, loss {loss}{left}")
            console.file.flush()

    def stop(self) -> None:
        """Leave the finished bar."""
        if self._progress is not None:
            self._progress.stop()
            self._progress.console.file.flush()

    def _left(self, step: int) -> str:
        """Return the time until the end of everything, from the pace since the first step."""
        if step == 1:
            self._begin = monotonic()
        if step < _FIRST:
            return ""
        pace = (monotonic() - self._begin) / (step - 1)
        remaining = pace * (self._steps - step + self.later)
        return f", {minutes(remaining)} left{' in all' if self.later else ''}"
