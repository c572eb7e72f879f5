"""The report's experiments from one end to the other at the toy scale, by the commands that a user types."""

from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

from tests.recipes.commands import last_checkpoint, losses, nemo_llm, skymoe

pytestmark = pytest.mark.long
UNTRAINED = 6.2
"""Below the loss of untrained weights, ln(512) = 6.24."""


@pytest.fixture(scope="module")
def dense(workplace: Path) -> Path:
    nemo_llm(workplace, "pretrain", "skywork_300m", "trainer.max_steps=30", scale="toy", name="dense")
    assert losses(workplace, "dense")[-1] < UNTRAINED - 0.3
    return last_checkpoint(workplace, "dense")


@pytest.fixture(scope="module")
def upcycled(workplace: Path, dense: Path) -> Path:
    skymoe(workplace, "upcycle", str(dense), "upcycled", "--to", "nemo", "--num-experts", "8")
    return workplace / "upcycled"


@pytest.mark.parametrize("start", ["100b", "300b", "300b_high_lr"])
def test_figure_1_goes_on_from_the_dense_model(workplace: Path, upcycled: Path, start: str) -> None:
    nemo_llm(
        workplace,
        "pretrain",
        "skywork_moe_300m_x8",
        scale="toy",
        start=start,
        resume_path=upcycled,
        name=start,
    )
    assert losses(workplace, start)[0] < UNTRAINED - 0.2


def test_figure_8_takes_its_experts_from_specialised_models(workplace: Path) -> None:
    def train(name: str, *more: str, **arguments: object) -> Path:
        nemo_llm(workplace, "pretrain", "skywork_1p3b", *more, scale="toy", name=name, **arguments)
        return last_checkpoint(workplace, name)

    base = train("base", "trainer.max_steps=30", max_lr=3e-3)
    sources = {
        domain: train(domain, train_only_ffn=True, resume_path=base, max_lr=1e-3)
        for domain in ("zh", "en", "code")
    }
    named = [f"{name}={path}" for name, path in {"base": base, **sources}.items()]
    how = ["--num-experts", "8", "--init", "specialized", "--expert-source", "zh:3,en:3,code:1,base:1"]
    skymoe(workplace, "upcycle", *named, "specialized", "--to", "nemo", *how)
    nemo_llm(
        workplace,
        "pretrain",
        "skywork_moe_1p3b_x8",
        scale="toy",
        sources=4,
        resume_path="specialized",
        name="four",
    )
    assert losses(workplace, "four")[0] < UNTRAINED


def test_lora_leaves_the_upcycled_weights(workplace: Path, upcycled: Path) -> None:
    name = "adapters"
    nemo_llm(
        workplace, "finetune", "skywork_moe_146b", "model.config.num_moe_experts=8",
        scale="toy", resume_path=upcycled, name=name,
    )  # fmt: skip
    seen = losses(workplace, name)
    assert seen[0] < UNTRAINED - 0.2
    reader = FileSystemReader(last_checkpoint(workplace, name) / "weights")
    saved = [tensor for tensor in reader.read_metadata().state_dict_metadata if "optim" not in tensor]
    assert all("adapter" in tensor for tensor in saved if tensor.startswith("module."))
    assert any(".experts." in tensor for tensor in saved) and not any("router" in tensor for tensor in saved)
    assert torch.isfinite(torch.tensor(seen)).all()
