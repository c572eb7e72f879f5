"""The recipes of SFT and LoRA through Bridge: where they begin, what they train, how they go on, and how they are merged."""

import hashlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.bridge import AutoBridge
from megatron.bridge.training import gpt_step
from safetensors.torch import load_file, save_file
from torch import Tensor

from nemo_skymoe.bridge.checks import check
from nemo_skymoe.bridge.recipes import RECIPES
from nemo_skymoe.bridge.training import finetune
from nemo_skymoe.checkpoint.sources import open_source
from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.durable.errors import CheckpointError
from nemo_skymoe.experiments import catalogue, choices
from nemo_skymoe.ranks import run_ranks
from tests.bridge.models import converted
from tests.bridge.recorded import Record, Recorder, same_bits
from tests.bridge.test_checkpoints import loss_by_transformers
from tests.cases import every
from tests.doors import case

STEPS = 2
EDP = {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2, "sequence_parallel": True}


class Watched(Recorder):
    """Keeps the weights and batches of the first step too."""

    def __init__(self) -> None:
        super().__init__()
        self.before: dict[str, Any] = {}
        self.batches: list[Tensor] = []

    def on_train_start(self, context: Any) -> None:
        self.on_train_end(context)
        self.before, self.record.weights, self.record.optimizer = self.record.weights, {}, []


@dataclass
class Run:
    """One rank's part."""

    record: Record = field(default_factory=Record)
    before: dict[str, Any] = field(default_factory=dict)
    batches: list[Any] = field(default_factory=list)


def trained(folder: Path, recipe: str, start: str, name: str, steps: int, model: dict[str, Any]) -> Run:
    """Steps of a recipe, on short samples of which no token is dropped."""
    os.chdir(folder)
    made: Any = RECIPES[catalogue.full_name(recipe)](
        name=name, dir="runs", corpus="corpus", resume_path=start, micro_batch_size=4, global_batch_size=4
    )
    for option, value in {"seq_length": case.LENGTH, "moe_expert_capacity_factor": None, **model}.items():
        setattr(made.model, option, value)
    made.dataset.seq_length = case.LENGTH
    made.train.train_iters, made.checkpoint.save_interval = steps, 1
    made.scheduler.lr_warmup_iters, made.scheduler.lr_decay_iters = 0, 100
    made.validation.eval_iters = 0
    made.checkpoint.most_recent_k = -1
    watched = Watched()
    original: Callable[..., Any] = gpt_step.get_batch

    def get_batch(*args: Any, **kwargs: Any) -> Any:
        batch = original(*args, **kwargs)
        watched.batches.append(torch.stack(batch[:2]).clone())
        return batch

    gpt_step.get_batch = get_batch
    finetune(made, callbacks=[watched])
    return Run(watched.record, watched.before, [batch.numpy() for batch in watched.batches])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a corpus, a dense model and an MoE made of it, each in both formats."""
    folder = tmp_path_factory.mktemp("finetuning")
    case.prepare(folder)
    case.upcycle(folder, to="bridge")
    case.upcycle(folder, to="hf")
    (folder / "bridge").rename(folder / "moe")
    converted(folder / "dense", folder / "dense-bridge", "bridge")
    return folder


@every(
    ("recipe", "ranks", "start", "published", "model"),
    [
        ("skywork_moe_tiny_sft_config", 2, "moe", "hf", EDP),
        ("skywork_moe_tiny_peft_config", 2, "moe", "hf", EDP),
        ("skywork_tiny_sft_config", 1, "dense-bridge", "dense", {}),
        ("skywork_tiny_peft_config", 1, "dense-bridge", "dense", {}),
    ],
)
def test_the_first_loss_is_that_of_the_checkpoint(
    recipe: str, ranks: int, start: str, published: str, model: dict[str, Any], place: Path
):
    """Evaluated by transformers on the same tokens; and what is trained is what the recipe says."""
    files = fingerprints(place / start)
    run, *_ = run_ranks(trained, ranks, place, recipe, start, f"{recipe}-first", 1, model)
    expected = loss_by_transformers(place / published, [torch.from_numpy(batch) for batch in run.batches])
    assert len(run.batches) == 1 and run.record.losses[0] == pytest.approx(expected, rel=1e-6)
    moved = {name for name, value in run.record.weights.items() if (value != run.before[name]).any()}
    adapters = {name for name in run.before if ".adapter." in name}
    assert moved == (adapters if "peft" in recipe else {*run.before})
    assert fingerprints(place / start) == files


def test_the_base_of_adapters_is_compared_as_every_start_is(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setenv("WORLD_SIZE", "2")
    made: Any = RECIPES[catalogue.full_name("skywork_moe_tiny_peft_config")](
        corpus="corpus", resume_path="moe"
    )
    check(made)
    made.model.layernorm_epsilon = 0.5
    with pytest.raises(ConfigurationError, match=r"model\.layernorm_epsilon is 0\.5, expected 1e-06"):
        check(made)


def fingerprints(folder: Path) -> dict[Path, str]:
    return {
        file: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.rglob("*") if file.is_file()
    }


@pytest.fixture(scope="module")
def lora(place: Path) -> Path:
    """A LoRA of two steps on two ranks."""
    run_ranks(trained, 2, place, "skywork_moe_tiny_peft_config", "moe", "lora", STEPS, EDP)
    return place / "runs" / "lora"


@pytest.fixture(scope="module")
def continued(lora: Path, place: Path) -> list[Run]:
    """The third step, by another start of the same run."""
    return run_ranks(trained, 2, place, "skywork_moe_tiny_peft_config", "moe", lora.name, STEPS + 1, EDP)


def test_a_lora_continues_bit_for_bit(continued: list[Run], place: Path):
    whole = run_ranks(trained, 2, place, "skywork_moe_tiny_peft_config", "moe", "whole", STEPS + 1, EDP)
    for one, other in zip(whole, continued, strict=True):
        assert len(other.record.losses) == 1 and one.record.losses[STEPS:] == other.record.losses
        assert same_bits(one.record.weights, other.record.weights)
        assert same_bits(one.record.optimizer, other.record.optimizer) and one.record.optimizer


def export(place: Path, iteration: Path) -> None:
    """By Bridge's own tool, in the format of Hugging Face's peft."""
    bridge: Any = AutoBridge.from_hf_pretrained(place / "hf")
    bridge.export_adapter_ckpt(iteration, place / "adapter")


def test_a_lora_is_exported_and_merged(lora: Path, continued: list[Run], place: Path):
    """The merged model has the loss of the next step: W + alpha / dim B A, as peft merges, evaluated by transformers."""
    iteration = lora / f"iter_{STEPS:07d}"
    with pytest.raises(CheckpointError, match=r"belongs to an adapter .*export_adapter_ckpt"):
        open_source(iteration)
    run_ranks(export, 1, place, iteration)
    adapter, merged = load_file(place / "adapter" / "adapter_model.safetensors"), place / "merged"
    scale = choices.LORA_ALPHA / choices.LORA_DIM
    shutil.copytree(place / "hf", merged)
    found = 0
    for file in merged.glob("*.safetensors"):
        weights = load_file(file)
        for name, weight in weights.items():
            prefix = f"base_model.model.{name.removesuffix('weight')}"
            if f"{prefix}lora_A.weight" in adapter:
                weight += scale * adapter[f"{prefix}lora_B.weight"] @ adapter[f"{prefix}lora_A.weight"]
                found += 2
        save_file(weights, file, {"format": "pt"})
    assert found == len(adapter) > 0
    run = continued[0]
    batches = [torch.from_numpy(batch) for batch in run.batches]
    assert run.record.losses == [pytest.approx(loss_by_transformers(merged, batches), rel=1e-6)]
    assert run.record.losses != [pytest.approx(loss_by_transformers(place / "hf", batches), rel=1e-6)]
