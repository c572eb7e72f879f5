"""The command trains a recipe of the report at the size of a toy, in phases with mixtures, and starts another run from it."""

import os
import shutil
from pathlib import Path

from transformers import AutoTokenizer

from nemo_skymoe.bridge.__main__ import main
from nemo_skymoe.ranks import run_ranks
from tests.doors import case

PHASES = """
- {tokens: 512, max_lr: 1e-3, min_lr: 1e-4, mixture: "en:7 code:1", warmup_steps: 1}
- {tokens: 256, max_lr: 1e-4, min_lr: 0.0, mixture: "en:1 code:3"}
"""
TOY = ["--recipe", "skywork_moe_146b_pretrain_config", "scale=toy", "dir=runs", "validation.eval_iters=1"]


def train(folder: Path, *words: str) -> int:
    os.chdir(folder)
    return main([*TOY, *words])


def test_a_toy_in_phases_and_a_warm_start(tmp_path: Path) -> None:
    """The toy is in bf16, and saves in the background as at full size."""
    case.prepare(tmp_path)
    for domain in ("en", "code"):
        for suffix in ("bin", "idx"):
            corpus = tmp_path / "corpus"
            shutil.copy(corpus / f"train_text_document.{suffix}", corpus / f"{domain}.{suffix}")
    (tmp_path / "phases.yaml").write_text(PHASES)
    runs = {
        "phases": ["phases=phases.yaml", "corpus=corpus", "name=phases"],
        "warm": ["resume_path=runs/phases", "mixture=code:1", "corpus=corpus", "name=warm", "train.train_iters=1"],
    }  # fmt: skip
    for name, words in runs.items():
        assert run_ranks(train, 2, tmp_path, *words, timeout=300.0) == [0, 0], name
    steps = {name: [path.name for path in (tmp_path / "runs" / name).glob("iter_*")] for name in runs}
    assert steps == {"phases": ["iter_0000003"], "warm": ["iter_0000001"]}
    texts = ("def train(self):", "loss = 0.5")
    given, saved = (
        AutoTokenizer.from_pretrained(tmp_path / folder)
        for folder in ("corpus/tokenizer", "runs/warm/iter_0000001/tokenizer")
    )
    assert [saved.encode(text) for text in texts] == [given.encode(text) for text in texts]
