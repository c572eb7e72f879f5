"""The page that takes a Llama to a trained MoE: its commands run in their order, and those for 256 GPUs pass all checks."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

from nemo_skymoe.architecture import Architecture
from nemo_skymoe.cli import app
from nemo_skymoe.data.corpus import build_corpus
from nemo_skymoe.nemo.model import SkyworkModel
from tests.docs.pages import PAGES, Block
from tests.docs.workplace import without_weights
from tests.recipes.commands import last_checkpoint, losses, nemo_llm

(PAGE,) = (page for page in PAGES if page.name == "your-own-llama")
MARKER = "covered-by: tests/docs/test_your_own_llama.py::"
HERE = [
    b for b in PAGE.blocks if b.marker == f"{MARKER}test_the_page_runs_as_it_stands" or b.language == "python"
]
LARGE = [b for b in PAGE.blocks if b.marker == f"{MARKER}test_the_commands_for_256_gpus_pass_all_checks"]
SHOWN = [block.text for block in PAGE.blocks if block.language == "text"]
LLAMA_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "torch_dtype": "bfloat16",
    "num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0, "tie_word_embeddings": False, "bos_token_id": 128000, "eos_token_id": 128001,
    "rope_scaling": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
}  # fmt: skip
"""Llama 3.1 8B, as its config.json describes it."""


def skymoe(words: list[str]) -> str:
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, f"{words}\n{result.output}\n{result.exception!r}"
    return result.output


def nemo(words: list[str], folder: Path) -> None:
    """In this process for torchrun's ranks: as many as the recipe says."""
    (factory,), kind = (word for word in words if word.startswith("skywork")), words[2]
    recipe, _, inside = factory.removesuffix(")").partition("(")
    arguments = dict(argument.split("=", 1) for argument in inside.split(","))
    dry = "--dryrun" in words
    more = [
        word for word in words[words.index(factory) + 1 :] if word not in ("--yes", "run.executor=torchrun")
    ]
    nemo_llm(
        folder, kind, recipe, *more, ranks=1 if dry else int(arguments["num_gpus_per_node"]), **arguments
    )


def run(block: Block, folder: Path) -> str:
    """All commands of a block, or its Python; what skymoe printed."""
    if block.language == "python":
        exec(compile("\n" * (block.line - 1) + block.text, PAGE.path, "exec"), {})
        return ""
    printed = ""
    for words in block.commands:
        if words[0] == "nemo":
            nemo(words, folder)
        else:
            assert words[0] == "skymoe", words
            printed += skymoe(words[1:])
    return printed


@pytest.fixture
def batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder where every rank leaves the first batch of its run."""
    step = SkyworkModel.forward_step

    def kept(self: Any, batch: Any) -> Any:
        file = tmp_path / f"batch{os.environ['RANK']}"
        number = len([*tmp_path.glob(f"{file.name}.*")])
        if self.training:
            torch.save({k: batch[k] for k in ("tokens", "labels", "loss_mask")}, f"{file}.{number}")
        return step(self, batch)

    monkeypatch.setattr(SkyworkModel, "forward_step", kept)
    return tmp_path


def loss_of(model: Any, batch: dict[str, Tensor]) -> float:
    with torch.no_grad():
        logits = model(batch["tokens"]).logits
    each = cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="none")
    return float((each * batch["loss_mask"].flatten()).sum() / batch["loss_mask"].sum())


def test_the_page_runs_as_it_stands(batches: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "laptop"
    folder.mkdir()
    monkeypatch.chdir(folder)
    build_corpus(
        Path("runs/corpus"),
        512,
        0.3,
        files=[f"{file}.py" for file in ("argparse", "typing", "inspect", "ast")],
    )
    printed = "".join(run(block, folder) for block in HERE)
    assert len(HERE) == 8
    for line in "".join(SHOWN).splitlines():
        assert line in printed
    assert printed.count("every bit as expected") == 2
    seen = losses(folder, "skywork_moe")
    assert len(seen) == 8 and "step=7" in last_checkpoint(folder, "skywork_moe").name
    # Eight micro-batches of one sequence make the first step; both ranks of the EDP group have the same.
    dense: Any = LlamaForCausalLM.from_pretrained("llama", torch_dtype=torch.float32)
    first = [torch.load(batches / f"batch0.{number}") for number in range(8)]
    assert seen[0] == pytest.approx(sum(loss_of(dense, batch) for batch in first) / 8, rel=1e-6)
    assert any(Path("exported-mixtral").glob("*.safetensors"))


def test_the_commands_for_256_gpus_pass_all_checks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With /data here, and headers alone in place of the weights."""
    sizes = Architecture(32, 4096, 14336, 32, vocab_size=128256, num_query_groups=8)
    without_weights(tmp_path / "data" / "llama-3.1-8b", LLAMA_8B, sizes)
    printed = ""
    for words in (words for block in LARGE for words in block.commands):
        here = [word.replace("/data", f"{tmp_path}/data") for word in words]
        if here[0] == "export":
            for name, _, value in (word.partition("=") for word in here[1:]):
                monkeypatch.setenv(name, value)
        else:
            printed += skymoe(here[1:])
    assert "8,030,261,248" in printed  # parameters, as Llama 3.1 8B is published
    assert "32 x 8 = 256 ranks, PP 2 x TP 4 x DP 32, EP 4" in printed and "#SBATCH --nodes=32" in printed
    assert printed.count("#!/bin/bash") == 3
    assert [file.name for file in (tmp_path / "data").iterdir()] == ["llama-3.1-8b"]
