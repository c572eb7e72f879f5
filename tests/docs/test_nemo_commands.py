"""Every `nemo llm pretrain` and `finetune` on the pages, as NeMo-Run reads it; the tests named beside them run the like."""

import os
import sys
from pathlib import Path
from typing import Any

from nemo_run.cli import api

from nemo_skymoe import nemo_cli  # noqa: F401
from nemo_skymoe.ranks import run_ranks
from tests.cases import every
from tests.docs.pages import PAGES

COMMANDS = [
    words for page in PAGES for b in page.blocks for words in (b.commands if b.language == "bash" else [])
]
TRAININGS = [words for words in COMMANDS if words[:2] == ["nemo", "llm"] and "--factory" in words]
SITE = {
    "ACCOUNT": "llm",
    "PARTITION": "a800",
    "TIME": "24:00:00",
    "IMAGE": "/a.sqsh",
    "MOUNTS": "/data:/data",
}


def dry_run(words: list[str], folder: Path) -> int:
    os.chdir(folder)
    sys.argv = [*words, "--dryrun"]
    try:
        api.create_cli()(standalone_mode=True)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@every("words", TRAININGS, ids=lambda words: words[4])
def test_nemo_run_understands_it(words: list[str], tmp_path: Path) -> None:
    environment: dict[str, Any] = {f"SKYMOE_SLURM_{name}": value for name, value in SITE.items()}
    environment["NEMORUN_HOME"] = str(tmp_path)
    assert run_ranks(dry_run, 1, words, tmp_path, env=environment) == [0]
