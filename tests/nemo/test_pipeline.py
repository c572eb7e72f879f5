"""A recipe with a pipeline plan: NeMo trains what it trains on one rank, and recomputes what the plan says."""

import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fiddle as fdl
import lightning.pytorch as pl
import nemo_run as run
import pytest
import torch
from nemo import lightning as nl
from nemo_run.core.serialization.zlib_json import ZlibJSONSerializer

from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.data.corpus import build_corpus
from nemo_skymoe.nemo.model import SkyworkMoE146BConfig, SkyworkMoEModel
from nemo_skymoe.nemo.pipeline import PipelinePlan, written_plan
from nemo_skymoe.patches import nemo_cpu
from nemo_skymoe.ranks import run_ranks
from nemo_skymoe.recipes import skywork_moe_tiny
from tests.cases import every

LAYERS, STEPS, CUT, MICRO_BATCHES = 5, 4, 2, 4
TWO = run.Config(PipelinePlan, layout="Ett|tttL", recompute=[[2], [1]])
VIRTUAL = run.Config(PipelinePlan, layout="Ett|t|t|tL", recompute=[[1, 1], [0, 1]])


@dataclass
class Kept:
    """What a rank saw of a run: losses by step, coefficients by step and layer, layers and their forward passes."""

    losses: dict[int, float] = field(default_factory=dict)
    coefficients: dict[int, dict[int, float]] = field(default_factory=dict)
    layers: list[list[int]] = field(default_factory=list)
    calls: Counter[int] = field(default_factory=Counter)


class Keep(pl.Callback):
    def __init__(self) -> None:
        self.kept = Kept()

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        chunks: Any = trainer.model
        for chunk in chunks:
            layers = [m for m in chunk.modules() if type(m).__name__ == "TransformerLayer"]
            self.kept.layers.append([layer.layer_number for layer in layers])
            for layer in layers:
                layer.register_forward_hook(self._count)

    def _count(self, layer: Any, *_: Any) -> None:
        self.kept.calls.update([layer.layer_number] if layer.training else [])

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.kept.losses[trainer.global_step] = trainer.callback_metrics["reduced_train_loss"].item()
        (callback,) = [c for c in trainer.callbacks if type(c).__name__ == "SkyworkMoECallback"]  # type: ignore[attr-defined]
        coefficients = callback._controller.coefficient_by_layer()
        self.kept.coefficients[trainer.global_step] = coefficients


class Stop(pl.Callback):
    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.global_step >= CUT


def recipe(
    folder: Path,
    name: str,
    pipeline: Any = None,
    start: str | None = None,
    steps: int = STEPS,
    saves: bool = True,
) -> Any:
    """`skywork_moe_tiny` without EDP on one rank, or on two stages under a plan."""
    made = skywork_moe_tiny.pretrain_recipe(
        dir=str(folder), name=name, corpus=str(folder / "corpus"), resume_path=start, edp=1,
        devices=2 if pipeline else 1, max_steps=steps, seq_length=64, micro_batch_size=8 // MICRO_BATCHES,
        limit_val_batches=0, warmup_steps=1, similarity_interval=0,
    )  # fmt: skip
    made.model.config.num_layers, made.model.config.seq_length = LAYERS, 64
    made.model.config.moe_adaptive_aux_loss_smoothing = 0.5
    # The norm is a sum over stages: its last bit depends on them.
    made.optim.config.clip_grad = 0.0
    made.trainer.log_every_n_steps = 1
    made.log.ckpt.every_n_train_steps = CUT
    if not saves:
        made.log.ckpt = None
    if pipeline:
        made.trainer.strategy.pipeline_model_parallel_size = 2
        made.pipeline = pipeline
    return made


def train(made: Any) -> Kept:
    nemo_cpu.apply()
    keep = Keep()
    partial = fdl.build(made)
    partial.keywords["trainer"].callbacks.append(keep)
    partial()
    return keep.kept


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        files = ["argparse.py", "typing.py", "inspect.py", "pydoc.py", "shutil.py", "uuid.py", "ast.py"]
        build_corpus(Path(name) / "corpus", 512, 0.3, files=files)
        yield Path(name)


@pytest.fixture(scope="module")
def start(folder: Path) -> str:
    """Weights that all runs start from: stages draw their own."""
    run_ranks(train, 1, recipe(folder, "start", steps=1))
    (checkpoint,) = (folder / "start" / "checkpoints").glob("*-last")
    return str(checkpoint)


@pytest.fixture(scope="module")
def one_rank(folder: Path, start: str) -> Kept:
    return run_ranks(train, 1, recipe(folder, "one rank", start=start, saves=False))[0]


@pytest.fixture(scope="module")
def two_stages(folder: Path, start: str) -> list[Kept]:
    cut = recipe(folder, "two", TWO, start)
    cut.trainer.callbacks.append(run.Config(Stop))
    return run_ranks(train, 2, cut)


def coefficients(ranks: list[Kept]) -> dict[int, dict[int, float]]:
    return {
        step: {n: v for rank in ranks for n, v in rank.coefficients[step].items()} for step in ranks[0].losses
    }


def passes(ranks: list[Kept], steps: int) -> dict[int, float]:
    """Forward passes of every layer for a micro-batch."""
    return {n: calls / (steps * MICRO_BATCHES) for rank in ranks for n, calls in rank.calls.items()}


def test_unequal_stages_train_what_one_rank_does(one_rank: Kept, two_stages: list[Kept]) -> None:
    assert [rank.layers for rank in two_stages] == [[[1, 2]], [[3, 4, 5]]]
    assert passes(two_stages, CUT) == {1: 2, 2: 2, 3: 2, 4: 1, 5: 1}
    for rank in two_stages:
        assert rank.losses == {step: one_rank.losses[step] for step in range(1, CUT + 1)}
    assert coefficients(two_stages) == {step: one_rank.coefficients[step] for step in range(1, CUT + 1)}
    assert len(set(one_rank.losses.values())) == STEPS


def test_a_resumed_run_follows_the_plan_too(folder: Path, one_rank: Kept, two_stages: list[Kept]) -> None:
    resumed = run_ranks(train, 2, recipe(folder, "two", TWO))
    assert passes(resumed, STEPS - CUT) == {1: 2, 2: 2, 3: 2, 4: 1, 5: 1}
    for rank in resumed:
        assert rank.losses == {step: one_rank.losses[step] for step in range(CUT + 1, STEPS + 1)}


def test_virtual_stages_train_what_one_rank_does(folder: Path, start: str, one_rank: Kept) -> None:
    ranks = run_ranks(train, 2, recipe(folder, "virtual", VIRTUAL, start, saves=False))
    assert [rank.layers for rank in ranks] == [[[1, 2], [4]], [[3], [5]]]
    assert passes(ranks, STEPS) == {1: 2, 2: 1, 3: 1, 4: 2, 5: 2}
    assert ranks[0].losses == ranks[1].losses == one_rank.losses
    assert coefficients(ranks) == one_rank.coefficients


def test_a_recipe_with_a_plan_survives_serialisation() -> None:
    made = skywork_moe_tiny.pretrain_recipe()
    made.pipeline = TWO
    serializer = ZlibJSONSerializer()
    assert serializer.deserialize(serializer.serialize(made)) == made


def test_a_plan_is_read_from_its_file_when_it_is_built(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    made = run.Config(written_plan, file=str(file))
    with pytest.raises(ConfigurationError, match=r"plan.json' cannot be read, .*FileNotFoundError"):
        written_plan(str(file))
    for text in ("", "[]", '{"layout": "Et|tL"}'):
        file.write_text(text)
        with pytest.raises(
            ConfigurationError, match=r"plan.json' cannot be read, expected what `skymoe plan"
        ):
            written_plan(str(file))
    file.write_text('{"layout": "Et|tL", "recompute": [[1], [0]], "bubble": 0.1}')
    assert fdl.build(made) == PipelinePlan("Et|tL", [[1], [0]])


def model_and_trainer(stages: int, layout: str | None = None) -> tuple[Any, Any]:
    """Of 52 layers; the trainer is no more than its strategy and callbacks, or it would look for GPUs."""
    strategy = nl.MegatronStrategy(
        pipeline_model_parallel_size=stages,
        pipeline_model_parallel_layout=layout,
        pipeline_dtype=torch.bfloat16,
        tensor_model_parallel_size=4,
        expert_model_parallel_size=4,
        expert_tensor_parallel_size=1,
        sequence_parallel=True,
    )
    return SkyworkMoEModel(SkyworkMoE146BConfig()), SimpleNamespace(strategy=strategy, callbacks=[])


def test_the_plan_reaches_strategy_and_configuration_before_anything_is_built() -> None:
    model, trainer = model_and_trainer(2)
    PipelinePlan("Et*13|(t*13|)*2t*13L").apply(model, trainer)
    assert trainer.strategy.pipeline_model_parallel_layout == "Et*13|(t*13|)*2t*13L"
    assert trainer.strategy.virtual_pipeline_model_parallel_size == 2
    assert not model.config.batch_p2p_comm
    assert trainer.callbacks == []


TWELVE = "Et*4|(t*5|)*4(t*4|)*6t*4L"


@every(
    ("plan", "layout", "message"),
    [
        (PipelinePlan("Et*26|t*26L"), TWELVE, "pipeline_model_parallel_layout of trainer.strategy is 'Et"),
        (PipelinePlan("Et*26|t*26L"), None, "with 2 chunks, expected a multiple of pipeline_model_parallel_size = 12"),
        (PipelinePlan(TWELVE, [[0]] * 11 + [[5]]), None, "recompute is 5 on stage 11, virtual stage 0, expected 0 to its 4"),
    ],
)  # fmt: skip
def test_a_plan_that_does_not_fit_is_refused(plan: PipelinePlan, layout: Any, message: str) -> None:
    model, trainer = model_and_trainer(12, layout)
    with pytest.raises(ConfigurationError, match=message):
        plan.apply(model, trainer)
    assert trainer.callbacks == []
    assert trainer.strategy.pipeline_model_parallel_layout == layout
