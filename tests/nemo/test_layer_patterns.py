"""The same pattern of MoE and dense layers under every spelling: own checkpoints, warm starts, and other patterns."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fiddle as fdl
import lightning.pytorch as pl
import nemo_run as run
import pytest
from nemo.lightning import RestoreConfig

from nemo_skymoe.checkpoint.torch_dist.storage import TorchDistStorage
from nemo_skymoe.data.corpus import build_corpus
from nemo_skymoe.patches import nemo_cpu
from nemo_skymoe.ranks import RankFailed, run_ranks
from nemo_skymoe.recipes import skywork_moe_tiny

FILES = ["argparse.py", "typing.py", "inspect.py", "pydoc.py", "shutil.py", "uuid.py", "ast.py", "pickle.py"]


class Keep(pl.Callback):
    def __init__(self) -> None:
        self.losses: dict[int, float] = {}

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.losses[trainer.global_step] = trainer.callback_metrics["reduced_train_loss"].item()


def train(folder: Path, name: str, pattern: Any, steps: int, start: Path | None) -> dict[int, float]:
    nemo_cpu.apply()
    made = skywork_moe_tiny.pretrain_recipe(
        dir=str(folder), name=name, corpus=str(folder / "corpus"), scale="toy", edp=1, devices=1, similarity_interval=0,
    )  # fmt: skip
    made.trainer.devices, made.trainer.max_steps, made.trainer.limit_val_batches = 1, steps, 0
    made.data.micro_batch_size = 4
    made.model.config.moe_layer_freq = pattern
    made.optim.lr_scheduler.shape, made.optim.lr_scheduler.warmup_steps = "constant", 0
    made.optim.config.lr, made.optim.config.min_lr, made.optim.lr_scheduler.final_fraction = 1e-3, 1e-4, 0.1
    if start is not None:
        made.resume.restore_config = run.Config(RestoreConfig, path=str(start))
    keep = Keep()
    partial = fdl.build(made)
    partial.keywords["trainer"].callbacks.append(keep)
    partial()
    return keep.losses


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        build_corpus(Path(name) / "corpus", 512, 0.3, files=FILES)
        yield Path(name)


def trained(
    folder: Path, name: str, pattern: Any, steps: int = 2, start: Path | None = None
) -> dict[int, float]:
    (losses,) = run_ranks(train, 1, folder, name, pattern, steps, start)
    return losses


def last(folder: Path, name: str) -> Path:
    (checkpoint,) = (folder / name / "checkpoints").glob("*-last")
    return checkpoint


def numbered(checkpoint: Path) -> bool:
    return any(".layers.0." in name for name in TorchDistStorage(checkpoint).tensors)


@pytest.mark.parametrize(
    ("spellings", "other"),
    [
        ((1, [1, 1]), [0, 1]),
        ((2, [1, 0]), [0, 1]),
        pytest.param(([1, 1], 1), [1, 0], marks=pytest.mark.long),
    ],
)
def test_a_pattern_starts_from_itself_however_it_is_spelled(folder: Path, spellings: Any, other: Any) -> None:
    first, second = spellings
    name = f"from_{first}"
    begun = trained(folder, name, first)
    assert sorted(begun) == [1, 2]
    stored = numbered(last(folder, name))
    assert stored == (first != 1)
    started = {
        str(pattern): trained(folder, f"{name}_{pattern}", pattern, start=last(folder, name))
        for pattern in spellings
    }
    assert started[str(first)] == started[str(second)], "the weights were not those of the checkpoint"
    assert started[str(first)][1] < begun[1]
    assert numbered(last(folder, f"{name}_{second}")) == stored
    with pytest.raises(
        RankFailed, match=r"model\.config\.moe_layer_freq is .*, expected .*differs_from_checkpoint"
    ):
        trained(folder, f"{name}_other", other, start=last(folder, name))
    assert not (folder / f"{name}_other").exists()
    # Its own checkpoint, resumed under the other spelling.
    assert sorted(trained(folder, name, second, steps=3)) == [3]
    with pytest.raises(RankFailed, match=r"model\.config\.moe_layer_freq is .*, expected"):
        trained(folder, name, other, steps=4)
