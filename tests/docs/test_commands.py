"""Every command in docs/ is run here, or by the test that its marker names, or says what it needs.

Markers stand in a comment above a block: `covered-by: FILE::TEST` of a test that runs the same, `file: PATH` of a file
that the page's commands find. A block that cannot run here begins with `# needs: cluster`, or another of NEEDS. The
blocks of a page run in their order in one folder, where `workplace.prepare` has put what the page takes as given. A
block `text` below one is a part of its output.
"""

import ast
import re
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from nemo_skymoe.cli import app
from nemo_skymoe.launch.composition import compose_groups
from tests.cases import every
from tests.docs.pages import PAGES, ROOT, Block, Page
from tests.docs.workplace import prepare

NEEDS = {"cluster", "GPU", "network", "weights", "Megatron-Bridge", "Megatron-LM", "container", "peft"}
BLOCKS = [block for page in PAGES for block in page.blocks]
COMMANDS = [block for block in BLOCKS if block.language == "bash"]
OTHERS = {
    *("--dryrun", "--factory", "--nproc-per-node", "--no-deps"),
    *("--recipe", "--list"),
    *("--no-", "--spec"),
}
"""Options of NeMo-Run, torchrun and pip, of `python -m nemo_skymoe.bridge`, and of Megatron-LM."""
PARSER: Any = typer.main.get_command(app)


def runs_here(block: Block) -> bool:
    return block.language == "bash" and block.needs is None and block.marker is None


@every("block", BLOCKS, ids=lambda block: block.label)
def test_every_block_runs_here_or_says_where(block: Block) -> None:
    if block.needs is not None:
        assert set(block.needs.split(", ")) <= NEEDS
    kind, _, target = (block.marker or "").partition(": ")
    assert kind in ("", {"bash": "covered-by", "yaml": "file"}.get(block.language))
    if kind == "covered-by":
        file, _, test = target.partition("::")
        nodes = ast.walk(ast.parse((ROOT / file).read_text()))
        assert test.startswith("test_")
        assert test in {node.name for node in nodes if isinstance(node, ast.FunctionDef)}


@every("block", COMMANDS, ids=lambda block: block.label)
def test_commands_and_options_exist(block: Block) -> None:
    """Those that are not run, too."""
    for words in block.commands:
        if words[0] == "skymoe":
            context = PARSER.commands[words[1]].make_context(words[1], words[2:])
            if words[1] == "launch" and context.params["config_dir"] is None:
                compose_groups(context.params["overrides"] or [])
        assert all((ROOT / word).exists() for word in words if word.startswith("slurm/"))


@every("page", PAGES, ids=lambda page: page.name)
def test_options_in_the_text_exist(page: Page) -> None:
    known = {
        name
        for command in PARSER.commands.values()
        for option in command.params
        for name in (*option.opts, *option.secondary_opts)
    }
    for code in page.code:
        for option in re.findall(r"(?<!\S)--[\w-]+", code):
            assert option in known | OTHERS, code
        if code.startswith("skymoe "):
            assert code.split()[1] in PARSER.commands, code


def run(block: Block, expected: str | None) -> None:
    """In the working directory; `expected` are lines that the output has to have."""
    output = ""
    for words in block.commands:
        assert words[0] == "skymoe", f"{block.label}: nothing here runs {words[0]}"
        result = CliRunner().invoke(app, words[1:])
        output += result.output
        assert result.exit_code == 0, f"{block.label}: {words}\n{output}\n{result.exception!r}"
    for line in (expected or "").splitlines():
        assert line in output, f"{block.label} did not print {line!r}, but\n{output}"


def steps(page: Page) -> list[tuple[Block, str | None]]:
    """The shell blocks that run here, each with the block of output that is shown below it."""
    following = zip_longest(page.blocks, page.blocks[1:])
    return [
        (block, after.text if after and after.language == "text" else None)
        for block, after in following
        if runs_here(block)
    ]


@every("page", [page for page in PAGES if steps(page)], ids=lambda page: page.name)
def test_the_commands_of_a_page_run(page: Page, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    prepare(page.name)
    page.write_files()
    for block, expected in steps(page):
        run(block, expected)
