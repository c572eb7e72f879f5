"""The last checkpoint of a run, where a checkpoint is asked for."""

import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from nemo_skymoe.checkpoint.run_folder import checkpoint_of, last_checkpoint
from nemo_skymoe.cli import app
from nemo_skymoe.config import ConfigurationError


def saved(run: Path, step: int) -> Path:
    folder = run / "checkpoints" / f"step={step}-last"
    folder.mkdir(parents=True)
    os.utime(folder, (step, step))
    return folder


def test_the_newest_that_is_complete(tmp_path: Path) -> None:
    saved(tmp_path, 9), saved(tmp_path, 100)
    newest = saved(tmp_path, 101)
    assert last_checkpoint(tmp_path) == checkpoint_of(tmp_path) == newest
    (newest.parent / "step=101-last-unfinished").touch()
    assert last_checkpoint(tmp_path).name == "step=100-last"
    (newest.parent / "step=100").mkdir()
    assert last_checkpoint(tmp_path).name == "step=100-last"


def test_any_other_folder_is_itself(tmp_path: Path) -> None:
    assert checkpoint_of(tmp_path) == tmp_path


@pytest.mark.parametrize("command", [["inspect"], ["convert", "--to", "hf"], ["verify"]])
def test_a_run_that_has_saved_nothing(command: list[str], tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ConfigurationError, match=r"has no \*-last that is complete"):
        last_checkpoint(tmp_path / "run")
    folders = [str(tmp_path / "run")] + ([] if command == ["inspect"] else [str(tmp_path / "out")])
    answer = CliRunner().invoke(app, [command[0], *folders, *command[1:]])
    assert answer.exit_code == 2 and answer.stderr.count("\n") == 1
