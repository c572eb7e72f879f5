"""What the terminal is told while a phase of the demo trains."""

import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest

from nemo_skymoe.checkpoint.untrusted import context_check
from nemo_skymoe.demo import progress, story
from nemo_skymoe.demo.progress import Bar
from nemo_skymoe.demo.record import Story
from nemo_skymoe.ranks import TERMINAL


def test_the_time_left_in_all_is_said_from_the_third_step_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a clock by which every step takes two seconds, and with work of fifty more afterwards."""
    now = SimpleNamespace(step=0)
    monkeypatch.setattr(progress, "monotonic", lambda: 2.0 * now.step)
    file = tmp_path / "in place of a terminal"
    with file.open("w") as terminal:
        monkeypatch.setenv(TERMINAL, str(terminal.fileno()))
        bar = Bar("dense", later=50)
        bar.start(100)
        for now.step in range(1, 101):
            bar.move(now.step, 4.5)
        bar.stop()
    lines = file.read_text().splitlines()
    assert len(lines) == 11
    assert lines[0] == "  dense: step 3/100, loss 4.500, 4 min 54 s left in all"
    assert lines[-1] == "  dense: step 100/100, loss 4.500, 1 min 40 s left in all"


def test_a_checkpoint_can_keep_the_callback_that_moves_the_bar(tmp_path: Path) -> None:
    """NeMo pickles it when the trainer is made, and a checkpoint with anything but callbacks and plain values is refused."""
    from nemo_skymoe.demo.through_nemo import Progress

    file = tmp_path / "callback"
    file.write_bytes(pickle.dumps([Progress("dense", 2.0)]))
    context_check._check_pickle(file)


def test_what_comes_later_is_counted_in_steps_of_the_training() -> None:
    """By hand, with costs of 2, 30, 3, 1 and 10: dense steps, upcycling, MoE steps, continued steps, comparison."""
    told = Story(Path(), dense_steps=100, steps=200)
    with pytest.MonkeyPatch.context() as patch:
        costs = {"dense": 2.0, "upcycling": 30.0, "moe": 3.0, "dense_continued": 1.0, "comparison": 10.0}
        patch.setattr(story, "_COSTS", costs)
        assert story._later(told, "dense") == (30 + 600 + 200 + 10) / 2
        assert story._later(told, "moe") == (200 + 10) / 3
        assert story._later(told, "dense_continued") == 10
