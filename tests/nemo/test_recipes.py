"""`nemo llm pretrain` as a process, and what the package says in NeMo's log."""

import logging
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from nemo_run.cli.cli_parser import parse_value

from nemo_skymoe.config import SkyworkOptions
from nemo_skymoe.data.corpus import build_corpus
from nemo_skymoe.nemo import api
from tests.waiting import HANG


def test_nemo_llm_pretrain_runs_the_recipe_on_two_torchrun_ranks(tmp_path: Path) -> None:
    """The command line a user types, as a process of its own."""
    files = [
        "argparse.py",
        "typing.py",
        "inspect.py",
        "pydoc.py",
        "shutil.py",
        "uuid.py",
        "ast.py",
        "pickle.py",
    ]
    build_corpus(tmp_path / "runs" / "corpus", 512, 0.3, files=files)
    binaries = Path(sys.executable).parent
    process = subprocess.run(
        [
            binaries / "nemo",
            "llm",
            "pretrain",
            "--factory",
            "skywork_moe_tiny",
            "--yes",
            "run.executor=torchrun",
            "trainer.max_steps=3",
            "trainer.limit_val_batches=1",
            "data.seq_length=64",
            "model.config.seq_length=64",
            "model.config.rotary_base=20000",
        ],
        cwd=tmp_path,
        env=os.environ
        | {"PATH": f"{binaries}:{os.environ['PATH']}", "NEMORUN_HOME": str(tmp_path / "nemo_run")},
        capture_output=True,
        text=True,
        timeout=HANG,
    )
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-3000:]
    assert "rotary_base is 20000 at seq_length 64" in process.stdout + process.stderr
    assert list((tmp_path / "runs" / "skywork_moe_tiny" / "checkpoints").glob("*-last")), process.stdout[
        -3000:
    ]


def test_nemo_run_reads_every_option_from_a_command_line() -> None:
    """`model.config.OPTION=VALUE`; it cannot parse `X | None`."""
    hints = get_type_hints(SkyworkOptions)
    for option in fields(SkyworkOptions):
        number = 0.5 if option.default is None else option.default
        value: Any = ["rotary_base"] if option.name == "differs_from_checkpoint" else number
        assert parse_value(str(value), hints[option.name]) == value, option.name


def test_what_the_package_says_reaches_nemos_log(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(api.logging, "info", said.append)
    monkeypatch.setattr(api.logging, "warning", said.append)
    api.log_through_nemo()
    api.log_through_nemo()
    logging.getLogger("nemo_skymoe.moe.edp").info("chosen")
    logging.getLogger("nemo_skymoe.moe.controller").warning("missing")
    assert said == ["chosen", "missing"]
