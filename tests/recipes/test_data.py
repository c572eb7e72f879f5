"""Mixtures and phases by the command line a user types, from text to training."""

import json
from pathlib import Path

import pytest

from nemo_skymoe.report.curves import read_curves
from tests.recipes.commands import last_checkpoint, losses, nemo_llm, skymoe

FIRST = "- {tokens: 512, mixture: {en: 7, zh: 2, code: 1}, max_lr: 1e-3, min_lr: 1e-4, shape: linear}\n"
SECOND = '- {tokens: 1024, mixture: "code:1 zh:1", max_lr: 5e-4, min_lr: 0, shape: linear}\n'


@pytest.fixture(scope="module")
def prepared(workplace: Path) -> Path:
    """The folder with `runs/text`, of three domains, by `skymoe preprocess`."""
    (workplace / "sources").mkdir()
    (workplace / "sources" / "module.py").write_text("def f():\n    return 0\n" * 300)
    (workplace / "sources" / "other.py").write_text("def g():\n    return 1\n" * 300)
    for domain in ("en", "zh"):
        lines = [json.dumps({"text": f"{domain} {number} " * 60}) for number in range(20)]
        (workplace / f"{domain}.jsonl").write_text("\n".join(lines))
    inputs = ("en=en.jsonl", "zh=zh.jsonl", "code=sources", "--format", "code=text", "--workers", "2")
    skymoe(workplace, "preprocess", *inputs, "runs/text", "--tokenizer", "runs/corpus/tokenizer")
    return workplace


@pytest.mark.long
def test_a_recipe_on_the_reports_mixture(prepared: Path) -> None:
    nemo_llm(
        prepared, "pretrain", "skywork_moe_146b", scale="toy", corpus="runs/text", name="mixed", mixture="en:7 zh:2 code:1"
    )  # fmt: skip
    assert len(losses(prepared, "mixed")) == 4


@pytest.mark.long
def test_phases_and_one_more_after_the_end(prepared: Path) -> None:
    chosen = {"scale": "toy", "corpus": "runs/text", "phases": "phases.yaml", "name": "phased"}
    (prepared / "phases.yaml").write_text(FIRST)
    nemo_llm(prepared, "pretrain", "skywork_moe_tiny", **chosen)
    before = last_checkpoint(prepared, "phased")
    (prepared / "phases.yaml").write_text(FIRST + SECOND)
    nemo_llm(prepared, "pretrain", "skywork_moe_tiny", **chosen)
    assert last_checkpoint(prepared, "phased") != before
    rates = read_curves(prepared / "runs" / "tensorboard" / "phased")["lr"].values
    assert list(rates) == pytest.approx([1e-3, 5.5e-4, 5e-4, 3.75e-4, 2.5e-4, 1.25e-4], rel=1e-6)
