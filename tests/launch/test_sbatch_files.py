"""The files for login nodes with nothing but bash: by bash itself, with SLURM's commands replaced."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nemo_skymoe.experiments import catalogue
from nemo_skymoe.recipes.executors import SAVING_SECONDS, VARIABLES, a800_slurm
from tests.waiting import HANG, wait_until

SLURM = Path(__file__).resolve().parents[2] / "slurm"
RECIPE = "skywork_moe_146b(dir=/data/runs,resume_path=/data/upcycled)"


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """Commands that write down what they were called with; srun waits for $HOLD to appear, if it is set."""
    folder = tmp_path / "bin"
    folder.mkdir()
    hold = 'if [ -n "${HOLD:-}" ]; then touch "$HOLD.started"; until [ -e "$HOLD" ]; do sleep 0.05; done; fi; exit ${CODE:-0}'
    actions = {
        "srun": hold,
        "scancel": 'touch "$HOLD"',
        "scontrol": 'echo "PreemptTime=${PREEMPTED:-None}"',
        "sbatch": "echo 41",
    }
    for name, action in actions.items():
        (folder / name).write_text(f'#!/bin/bash\nprintf "%q " {name} "$@" >> {tmp_path}/calls; echo >> {tmp_path}/calls\n{action}\n')  # fmt: skip
        (folder / name).chmod(0o755)
    return {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NUM_NODES": "192",
        "SKYMOE_SLURM_IMAGE": "/images/sky moe.sqsh",
        "SKYMOE_SLURM_MOUNTS": "/data:/data",
    }


def calls(folder: Path) -> list[list[str]]:
    return [shlex.split(line) for line in (folder / "calls").read_text().splitlines()]


def bash(file: str, *arguments: str, env: dict[str, str]) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        ["bash", SLURM / file, *arguments], env=env, capture_output=True, text=True, timeout=HANG
    )


def test_the_request_and_the_environment_are_the_executor_s(monkeypatch: pytest.MonkeyPatch) -> None:
    text = (SLURM / "pretrain.sbatch").read_text()
    exports = re.findall(r"^# (.*)\nexport (\w+)=(.*)$", text, re.MULTILINE)
    assert [(name, value, why) for why, name, value in exports] == [
        (v.name, v.value, v.why) for v in VARIABLES
    ]
    executor = a800_slurm(192, account="a", partition="p", container_image="i", container_mounts=["/d:/d"], time="24:00:00")  # fmt: skip
    flags = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", text, re.MULTILINE))
    for name in ("nodes", "ntasks_per_node", "gpus_per_node", "mem", "time"):
        assert flags[name.replace("_", "-")] == str(getattr(executor, name))
    assert "exclusive" in flags and "requeue" in flags and flags["signal"] == f"B:USR1@{SAVING_SECONDS}"
    assert all(flag in text for flag in executor.srun_args)


def test_pretraining(slurm: dict[str, str], tmp_path: Path) -> None:
    done = bash("pretrain.sbatch", RECIPE, "trainer.max_steps=10", env=slurm)
    assert (done.returncode, done.stderr) == (0, "")
    (*_, image, mounts, _, _, nemo, llm, pretrain, factory, recipe, yes, nodes, steps), _ = calls(tmp_path)
    assert image == "--container-image=/images/sky moe.sqsh" and mounts == "--container-mounts=/data:/data"
    assert (nemo, llm, pretrain, factory, recipe) == ("nemo", "llm", "pretrain", "--factory", RECIPE)
    assert (yes, nodes, steps) == ("--yes", "trainer.num_nodes=192", "trainer.max_steps=10")


def test_pretraining_through_bridge(slurm: dict[str, str], tmp_path: Path) -> None:
    words = ["skywork_moe_146b_pretrain_config", "dir=/data/a b", "train.train_iters=10"]
    done = bash("pretrain.sbatch", *words, env=slurm)
    assert (done.returncode, done.stderr) == (0, "")
    assert calls(tmp_path)[0][-7:] == ["python", "-m", "nemo_skymoe.bridge", "--recipe", *words]


def test_a_failure_is_the_job_s(slurm: dict[str, str], tmp_path: Path) -> None:
    assert bash("pretrain.sbatch", RECIPE, env={**slurm, "CODE": "3"}).returncode == 3
    assert [call[0] for call in calls(tmp_path)] == ["srun", "scontrol"]


def test_a_preempted_job_is_requeued_whatever_it_says_itself(slurm: dict[str, str], tmp_path: Path) -> None:
    assert bash("pretrain.sbatch", RECIPE, env={**slurm, "PREEMPTED": "2026-01-01T00:00:00"}).returncode == 0
    assert calls(tmp_path)[-1] == ["scontrol", "requeue", "7"]


def test_before_the_time_limit_ranks_save_and_the_job_is_requeued(
    slurm: dict[str, str], tmp_path: Path
) -> None:
    hold = tmp_path / "hold"
    job = subprocess.Popen(["bash", SLURM / "pretrain.sbatch", RECIPE], env={**slurm, "HOLD": str(hold)})
    wait_until("the start of the ranks", hold.with_suffix(".started").exists)
    job.send_signal(10)  # SIGUSR1, as #SBATCH --signal asks for
    assert job.wait(HANG) == 0
    _, told, asked, requeued = calls(tmp_path)
    assert told == ["scancel", "--signal=TERM", "7"] and asked == ["scontrol", "show", "job", "7"]
    assert requeued == ["scontrol", "requeue", "7"]


def test_a_command_of_skymoe(slurm: dict[str, str], tmp_path: Path) -> None:
    done = bash("skymoe.sbatch", "upcycle", "/data/a", "/data/b", "--to", "nemo", env=slurm)
    assert done.returncode == 0
    (call,) = calls(tmp_path)
    assert call[-6:] == ["skymoe", "upcycle", "/data/a", "/data/b", "--to", "nemo"]


@pytest.mark.parametrize(
    ("file", "arguments"), [("pretrain.sbatch", [RECIPE]), ("skymoe.sbatch", ["doctor"])]
)
def test_without_a_container(file: str, arguments: list[str], slurm: dict[str, str], tmp_path: Path) -> None:
    del slurm["SKYMOE_SLURM_MOUNTS"]
    assert bash(file, *arguments, env={**slurm, "SKYMOE_SLURM_IMAGE": "none"}).returncode == 0
    assert not [word for word in calls(tmp_path)[0] if "container" in word]


def test_the_pipeline_waits_for_its_first_job(slurm: dict[str, Any], tmp_path: Path) -> None:
    assert bash("pipeline.sh", "/data/a", "/data/b", "/data/runs", env=slurm).returncode == 0
    first, second = calls(tmp_path)
    assert first[:2] == ["sbatch", "--parsable"] and first[3:] == [
        "upcycle",
        "/data/a",
        "/data/b",
        "--to",
        "nemo",
    ]
    assert second[1] == "--dependency=afterok:41"
    assert second[-1] == "skywork_moe_146b(dir=/data/runs,resume_path=/data/b)"


def test_the_pipeline_through_bridge(slurm: dict[str, Any], tmp_path: Path) -> None:
    assert bash("pipeline.sh", "/data/a", "/data/b", "/data/runs", "bridge", env=slurm).returncode == 0
    first, second = calls(tmp_path)
    assert first[3:] == ["upcycle", "/data/a", "/data/b", "--to", "bridge"]
    assert second[-3:] == ["skywork_moe_146b_pretrain_config", "dir=/data/runs", "resume_path=/data/b"]
    assert second[-3] in catalogue.SHORT_NAMES
    refused = bash("pipeline.sh", "/data/a", "/data/b", "/data/runs", "brigde", env=slurm)
    assert refused.returncode == 2 and refused.stderr == "brigde: expected nemo or bridge\n"
    assert len(calls(tmp_path)) == 2


@pytest.mark.parametrize(
    ("file", "arguments"), [("pretrain.sbatch", [RECIPE]), ("skymoe.sbatch", ["doctor"])]
)
@pytest.mark.parametrize("missing", ["SKYMOE_SLURM_IMAGE", "SKYMOE_SLURM_MOUNTS", "argument"])
def test_what_is_missing_is_named(
    file: str, arguments: list[str], missing: str, slurm: dict[str, str], tmp_path: Path
) -> None:
    given = {name: value for name, value in slurm.items() if name != missing}
    done = bash(file, *(arguments if missing != "argument" else []), env=given)
    assert done.returncode != 0 and not (tmp_path / "calls").exists()
    assert "expected" in done.stderr and (missing == "argument" or missing in done.stderr)


def test_the_commands_that_they_run_exist() -> None:
    for command in ("skymoe", "nemo"):
        assert Path(sys.executable).with_name(command).exists()


def test_hostile_values_arrive_and_nothing_is_run(slurm: dict[str, str], tmp_path: Path) -> None:
    (place := tmp_path / "empty").mkdir()
    for value in ("a b", "$(touch marker)", "`touch marker`", ";touch marker", "'", '"', "\\", "*", "--x"):
        for file in ("pretrain.sbatch", "skymoe.sbatch"):
            (tmp_path / "calls").unlink(missing_ok=True)
            env = {**slurm, "SKYMOE_SLURM_IMAGE": value, "SKYMOE_SLURM_MOUNTS": f"{value}:/x"}
            done = subprocess.run(
                ["bash", SLURM / file, value, value], cwd=place, env=env, capture_output=True
            )
            assert done.returncode == 0 and list(place.iterdir()) == []
            words = calls(tmp_path)[0]
            assert f"--container-image={value}" in words and f"--container-mounts={value}:/x" in words
            assert words.count(value) == 2


def test_a_path_that_a_recipe_s_arguments_have_no_quotes_for_is_refused(
    slurm: dict[str, str], tmp_path: Path
) -> None:
    for bad in ("/data/a,name=b", "/data/a'", '/data/"', "/data/a\nb", " /data"):
        for arguments in (["/data/a", bad, "/data/runs"], ["/data/a", "/data/b", bad]):
            done = bash("pipeline.sh", *arguments, env=slurm)
            assert done.returncode == 2 and "expected a path without commas" in done.stderr
    assert not (tmp_path / "calls").exists()
