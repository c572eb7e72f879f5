"""Progress of a training in the terminal, while everything NeMo prints goes to a log file."""

import os
from typing import Any

import lightning.pytorch as pl
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_LINES = 20


class TerminalProgress(pl.Callback):
    """Step, loss and time left, written by rank 0 to the terminal that the story was started from.

    Args:
        title: What is being trained.
        terminal: File descriptor of the terminal, inherited by the forked ranks.
    """

    def __init__(self, title: str, terminal: int) -> None:
        self.title = title
        self.terminal = terminal
        self._progress: Progress | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the bar."""
        if not trainer.is_global_zero:
            return
        console = Console(file=os.fdopen(os.dup(self.terminal), "w"))
        self._progress = Progress(
            TextColumn("  {task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            refresh_per_second=4,
        )
        self._task = self._progress.add_task(self.title, total=trainer.max_steps, loss="-")
        self._progress.start()

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        """Move the bar; where the terminal is a file, print a line now and then."""
        if self._progress is None:
            return
        value = trainer.callback_metrics.get("reduced_train_loss")
        loss = "-" if value is None else f"{float(value):.3f}"
        step = trainer.global_step
        self._progress.update(self._task, completed=step, loss=loss)
        console = self._progress.console
        if not console.is_terminal and (step % max(1, trainer.max_steps // _LINES) == 0):
            left = self._progress.tasks[0].time_remaining
            console.print(
                f"  {self.title}: step {step}/{trainer.max_steps}, loss {loss}, {left or 0:.0f} s left"
            )
            console.file.flush()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the finished bar."""
        if self._progress is not None:
            self._progress.stop()
            self._progress.console.file.flush()
