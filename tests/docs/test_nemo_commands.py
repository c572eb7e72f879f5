"""Every `nemo llm pretrain` and `finetune` on the pages, as NeMo-Run reads it; the tests named beside them run the like."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest
from nemo_run.cli import api

from nemo_skymoe import nemo_cli
from nemo_skymoe.checkpoint import convert
from nemo_skymoe.checkpoint.convert import TargetOptions
from nemo_skymoe.checkpoint.sources import open_source
from nemo_skymoe.checkpoint.upcycling.options import BASE, Upcycling
from nemo_skymoe.ranks import run_ranks
from tests.cases import every
from tests.checkpoint import hf_models
from tests.docs.pages import PAGES

COMMANDS = [
    words for page in PAGES for b in page.blocks for words in (b.commands if b.language == "bash" else [])
]
TRAININGS = [words for words in COMMANDS if words[:2] == ["nemo", "llm"] and "--factory" in words]
OWN_MODEL = ("skywork_moe(", "skywork_dense(")
SITE = {
    "ACCOUNT": "llm",
    "PARTITION": "a800",
    "TIME": "24:00:00",
    "IMAGE": "/a.sqsh",
    "MOUNTS": "/data:/data",
}


def dry_run(words: list[str], folder: Path, has_start: bool) -> int:
    os.chdir(folder)
    if not has_start:  # a checkpoint of full size, or one that other commands of the page make
        nemo_cli.check_start = lambda *_, **__: None
    sys.argv = [*(word for word in words if word != "--dryrun"), "--dryrun"]
    try:
        api.create_cli()(standalone_mode=True)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pages' /data/dense and /data/upcycled, which some recipes read: as large as a layout of four tensor ranks needs."""
    folder = tmp_path_factory.mktemp("data")
    hf_models.llama(folder / "llama", num_attention_heads=4, num_key_value_heads=4)
    source, target = {BASE: open_source(folder / "llama")}, TargetOptions("nemo")
    convert.plan(source, target, None).run(folder / "dense")
    convert.plan(source, target, Upcycling(num_experts=16, moe_router_topk=2)).run(folder / "upcycled")
    return folder


@every("words", TRAININGS, ids=lambda words: words[4])
def test_nemo_run_understands_it(words: list[str], data: Path, tmp_path: Path) -> None:
    if own := words[4].startswith(OWN_MODEL):
        words = [word.replace("=/data/", f"={data}/") for word in words]
        (tmp_path / "upcycled").symlink_to(data / "upcycled")
    environment: dict[str, Any] = {f"SKYMOE_SLURM_{name}": value for name, value in SITE.items()}
    environment["NEMORUN_HOME"] = str(tmp_path)
    assert run_ranks(dry_run, 1, words, tmp_path, own, env=environment) == [0]
