"""Show the progress of a training in the terminal, while everything that NeMo prints goes to a log file."""

import os
from time import monotonic
from typing import Any

import lightning.pytorch as pl
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from nemo_skymoe.demo.record import minutes

_LINES = 10
_FIRST = 3  # a step or two are no measure: the first one allocates


class TerminalProgress(pl.Callback):
    """Step, loss and time left, which rank 0 writes to the terminal that the story was started from.

    Args:
        title: Name of the training.
        terminal: File descriptor of the terminal, inherited by the forked ranks.
        later: Length of everything after this training, as a number of its steps that would take as long.
    """

    def __init__(self, title: str, terminal: int, later: float = 0.0) -> None:
        self.title = title
        self.terminal = terminal
        self.later = later
        self._progress: Progress | None = None
        self._begin = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the bar."""
        if not trainer.is_global_zero:
            return
        console = Console(file=os.fdopen(os.dup(self.terminal), "w"))
        self._progress = Progress(
            TextColumn("  {task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}{task.fields[left]}"),
            console=console,
            disable=not console.is_terminal,
            refresh_per_second=4,
        )
        self._task = self._progress.add_task(self.title, total=trainer.max_steps, loss="-", left="")
        self._progress.start()

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        """Move the bar. If the terminal is a file, print a line from time to time."""
        if self._progress is None:
            return
        value = trainer.callback_metrics.get("reduced_train_loss")
        loss = "-" if value is None else f"{float(value):.3f}"
        step = trainer.global_step
        left = self._left(step, trainer.max_steps)
        self._progress.update(self._task, completed=step, loss=loss, left=left)
        console = self._progress.console
        every = max(1, trainer.max_steps // _LINES)
        if not console.is_terminal and (step == _FIRST or (step > _FIRST and step % every == 0)):
            console.print(f"  {self.title}: step {step}/{trainer.max_steps}, loss {loss}{left}")
            console.file.flush()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the finished bar."""
        if self._progress is not None:
            self._progress.stop()
            self._progress.console.file.flush()

    def _left(self, step: int, steps: int) -> str:
        """Return the time until the end of everything, from the pace since the first step."""
        if step == 1:
            self._begin = monotonic()
        if step < _FIRST:
            return ""
        pace = (monotonic() - self._begin) / (step - 1)
        return f", {minutes(pace * (steps - step + self.later))} left{' in all' if self.later else ''}"
