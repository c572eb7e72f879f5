"""What the terminal is told while a phase of the demo trains."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nemo_skymoe.demo import progress, story
from nemo_skymoe.demo.progress import TerminalProgress
from nemo_skymoe.demo.record import Story


def test_the_time_left_in_all_is_said_from_the_third_step_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a clock by which every step takes two seconds, and with work of fifty more afterwards."""
    loss = {"reduced_train_loss": 4.5}
    trainer: Any = SimpleNamespace(is_global_zero=True, max_steps=100, callback_metrics=loss)
    monkeypatch.setattr(progress, "monotonic", lambda: 2.0 * trainer.global_step)
    file = tmp_path / "in place of a terminal"
    with file.open("w") as terminal:
        callback = TerminalProgress("dense", terminal.fileno(), later=50)
        callback.on_train_start(trainer, None)  # type: ignore[arg-type]
        for trainer.global_step in range(1, 101):
            callback.on_train_batch_end(trainer)
        callback.on_train_end(trainer, None)  # type: ignore[arg-type]
    lines = file.read_text().splitlines()
    assert len(lines) == 11
    assert lines[0] == "  dense: step 3/100, loss 4.500, 4 min 54 s left in all"
    assert lines[-1] == "  dense: step 100/100, loss 4.500, 1 min 40 s left in all"


def test_what_comes_later_is_counted_in_steps_of_the_training() -> None:
    """By hand, with costs of 2, 30, 3, 1 and 10: dense steps, upcycling, MoE steps, continued steps, comparison."""
    told = Story(Path(), dense_steps=100, steps=200)
    with pytest.MonkeyPatch.context() as patch:
        costs = {"dense": 2.0, "upcycling": 30.0, "moe": 3.0, "dense_continued": 1.0, "comparison": 10.0}
        patch.setattr(story, "_COSTS", costs)
        assert story._later(told, "dense") == (30 + 600 + 200 + 10) / 2
        assert story._later(told, "moe") == (200 + 10) / 3
        assert story._later(told, "dense_continued") == 10
