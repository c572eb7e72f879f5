"""What a checkpoint has beside tensors is read as plain values; tests/bridge/test_coefficients.py reads Bridge's form of it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemWriter, save_state_dict

from nemo_skymoe.checkpoint.torch_dist.common_state import read_common_state
from nemo_skymoe.durable.errors import CheckpointError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of one tensor."""
    save_state_dict({"weight": torch.ones(2)}, FileSystemWriter(tmp_path), no_dist=True)
    (tmp_path / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist"}))
    return tmp_path


def test_the_file_of_older_versions_is_read(folder: Path):
    state = {"iteration": 3, "opt_param_scheduler": {"skywork_moe": {1: 0.017656250000000002}}}
    torch.save(state, folder / "common.pt")
    assert read_common_state(folder) == state


def test_a_checkpoint_without_one_is_refused(folder: Path):
    with pytest.raises(CheckpointError, match=r"has neither common\.pt nor one common state"):
        read_common_state(folder)


def test_what_is_no_state_is_refused_and_nothing_is_run(folder: Path):
    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (folder / "touched",))

    for content, message in (([1], "common state of list, expected a dict"), ({"a": Evil()}, r"common\.pt")):
        torch.save(content, folder / "common.pt")
        with pytest.raises(CheckpointError, match=message):
            read_common_state(folder)
    assert not (folder / "touched").exists()
