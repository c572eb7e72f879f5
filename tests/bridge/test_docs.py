"""What the page of Megatron-Bridge says: its commands and its Python run in their order, the options of its table exist."""

import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from nemo_skymoe.bridge.__main__ import main
from nemo_skymoe.bridge.recipes import RECIPES
from nemo_skymoe.cli import app
from nemo_skymoe.data.corpus import build_corpus
from nemo_skymoe.ranks import run_ranks
from nemo_skymoe.report.curves import read_curves
from tests.docs.pages import PAGES, Block
from tests.doors import case

[PAGE] = [page for page in PAGES if page.name == "bridge"]
[LLAMA] = [page for page in PAGES if page.name == "your-own-llama"]
HERE = [block for block in PAGE.blocks if block.needs == "Megatron-Bridge"]
EXPECTED = [block.text for block in PAGE.blocks if block.language == "text"]
ROWS = PAGE.text.partition("|---|---|\n")[2].partition("\n\n")[0].splitlines()
OPTION = re.compile(r"[a-z_]+(?:\.[a-z_]+)+")


def run(block: Block) -> str:
    """All commands of a block, or its Python on two ranks; what skymoe printed."""
    if block.language == "python":
        text = "\n" * (block.line - 1) + block.text
        ranks = 2 if "pretrain(config)" in text else 1
        run_ranks(execute, ranks, text)
        return ""
    return "".join(map(command, block.commands))


def execute(text: str) -> None:
    exec(compile(text, PAGE.path, "exec"), {"__name__": "bridge"})


def by_itself(words: list[str]) -> int:
    """Without what torchrun tells its ranks."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        del os.environ[name]
    return main(words)


def command(words: list[str]) -> str:
    """As torchrun starts it where the words say so."""
    if words[0] == "skymoe":
        result = CliRunner().invoke(app, words[1:])
        assert result.exit_code == 0, f"{words}\n{result.output}\n{result.exception!r}"
        return result.output
    program, _, arguments = " ".join(words).partition(" -m nemo_skymoe.bridge ")
    if program == "python":
        assert run_ranks(by_itself, 1, arguments.split()) == [0], words
        return ""
    ranks = int(program.removeprefix("torchrun --nproc-per-node "))
    assert run_ranks(main, ranks, arguments.split()) == [0] * ranks, words
    return ""


def test_the_page_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case.prepare(tmp_path)
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    Path("corpus").rename("runs/corpus")
    shutil.rmtree("dense")
    printed = "".join(map(run, HERE))
    assert len(HERE) == 8
    for text in EXPECTED:
        assert text in printed
    assert printed.count("every bit as expected") == 2
    for name in ("skywork_moe_tiny", "mine"):
        assert any(Path("runs", name).glob("iter_*")), name
    assert Path("runs/skywork_moe_tiny/latest_checkpointed_iteration.txt").read_text() == "6"
    assert any(Path("exported-by-bridge").glob("*.safetensors"))


def test_your_own_llama_goes_through_bridge_as_its_page_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    build_corpus(Path("runs/corpus"), 512, 0.3, files=["argparse.py", "typing.py", "inspect.py", "ast.py"])
    script = next(block for block in LLAMA.blocks if block.language == "python")
    run_ranks(execute, 1, script.text)
    [block] = [block for block in LLAMA.blocks if block.needs == "Megatron-Bridge"]
    assert run(block).count("every bit as expected") == 2
    assert Path("runs/bridged/latest_checkpointed_iteration.txt").read_text() == "6"
    assert len(read_curves(Path("runs/tensorboard/bridged"))["lm loss"].values) == 6


def test_the_options_of_bridge_in_the_table_exist(tmp_path: Path) -> None:
    case.prepare(tmp_path)
    config: Any = RECIPES["skywork_moe_tiny_pretrain_2rank_cpu_fp32_config"](corpus=str(tmp_path / "corpus"))
    found = 0
    for row in ROWS:
        for name in re.findall(r"`([^`]+)`", row.strip("|").split("|")[1]):
            if OPTION.fullmatch(name) and not name.startswith("nemo_skymoe."):
                section, _, option = name.partition(".")
                assert hasattr(getattr(config, section), option), name
                found += 1
    assert found > 25
