"""`skymoe launch` as a user meets it."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner, Result

from nemo_skymoe.cli import app
from tests.cases import every

ROOT = Path(__file__).resolve().parents[2]


def run(*options: str) -> Result:
    return CliRunner().invoke(app, ["launch", *options])


def test_the_composed_job_is_shown() -> None:
    answer = run("training=skywork_moe_146b", "cluster=a800_slurm", "jobs=[upcycle,training]", "training.max_lr=1e-4", "--cfg", "job")  # fmt: skip
    assert (answer.exit_code, answer.stderr) == (0, "")
    job = yaml.safe_load(answer.stdout)
    assert job["jobs"] == ["upcycle", "training"] and job["cluster"]["executor"] == "a800_slurm"
    assert job["training"] == {"recipe": "skywork_moe_146b", "task": "pretrain", "max_lr": 1e-4}


def test_a_sites_folder(tmp_path: Path) -> None:
    (tmp_path / "cluster").mkdir()
    (tmp_path / "cluster" / "ours.yaml").write_text("defaults: [a800_slurm]\naccount: llm\n")
    answer = run("cluster=ours", "--config-dir", str(tmp_path), "--cfg", "job")
    assert yaml.safe_load(answer.stdout)["cluster"]["account"] == "llm"


def test_a_dry_run_prints_what_would_be_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nemo_run import config

    monkeypatch.setattr(config, "_NEMORUN_HOME", str(tmp_path))
    answer = run("training=skywork_moe_tiny", "training.devices=1", "training.edp=1", "--dry-run")
    assert answer.exit_code == 0
    assert answer.stdout.startswith(
        "# training\n# pretrain skywork_moe_tiny: 1 x 1 = 1 ranks, PP 1 x TP 1 x DP 1, EP 1\n"
    )
    assert "--nproc-per-node 1 \\\n" in answer.stdout


@every(
    ("options", "message"),
    [
        (["traning=skywork_13b"], "group traning is unknown: did you mean training?"),
        (["--cfg", "hydra"], "--cfg is 'hydra', expected job"),
        (
            ["training.max_stepz=3", "--dry-run"],
            "option training.max_stepz is unknown: did you mean training.max_steps?",
        ),
        (["--config-dir", "absent"], "config_dir is absent, expected an existing folder"),
    ],
)
def test_bad_input_is_one_sentence(options: list[str], message: str) -> None:
    answer = run(*options)
    assert (answer.exit_code, answer.stdout) == (2, "")
    assert answer.stderr == f"skymoe: {message}\n"


def test_help_and_looking_need_no_nemo() -> None:
    code = """
import sys
from nemo_skymoe import cli
for options in (["--help"], ["training=skywork_moe_146b", "--cfg", "job"]):
    try:
        cli.app(["launch", *options])
    except SystemExit as exit:
        assert exit.code == 0
assert not {"nemo", "nemo_run", "torch"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_every_group_is_in_the_wheel() -> None:
    import tomllib

    from setuptools import find_packages

    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {*find_packages(str(ROOT), include=config["packages"]["find"]["include"])}
    assert {"nemo_skymoe.conf", "nemo_skymoe.recipes", "nemo_skymoe.patches"} <= found
    packaged = {
        file for glob in config["package-data"]["nemo_skymoe.conf"] for file in (ROOT / "conf").glob(glob)
    }
    assert packaged == set((ROOT / "conf").rglob("*.yaml"))
