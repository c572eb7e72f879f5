"""What is launched, as files that a person has read. After a change: SKYMOE_GOLDEN=write pytest tests/launch/test_golden.py"""

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from nemo_skymoe.commands.launch import jobs
from nemo_skymoe.launch.composition import compose_groups
from nemo_skymoe.launch.experiment import dry_run

GOLDEN = Path(__file__).with_name("golden")
REPORT = [
    "training=skywork_moe_146b",
    "cluster=a800_slurm",
    "jobs=[upcycle,training]",
    "upcycle.source=/data/skywork-13b",
    "upcycle.output_path=/data/upcycled",
    "training.dir=/data/runs",
    "data.corpus=/data/corpus",
]
CASES = {
    "skywork_moe_146b_192_nodes.sbatch": REPORT,
    "skywork_moe_tiny_torchrun.sh": ["training=skywork_moe_tiny"],
    "bridge_skywork_moe_146b_192_nodes.sbatch": ["frontdoor=bridge", *REPORT],
    "bridge_skywork_moe_tiny_torchrun.sh": [
        "frontdoor=bridge",
        "training=skywork_moe_tiny",
        "frontdoor.python=/venv/bin/python",
    ],
}


def launched(overrides: list[str], home: Path) -> str:
    text = dry_run(jobs(compose_groups(overrides)))
    text = re.sub(r"skymoe_\d{10,}", "skymoe_ID", text.replace(str(home), "/home/me/.nemo_run"))
    return re.sub(r"--rdzv-id \d+", "--rdzv-id ID", text)


@pytest.mark.parametrize("name", CASES)
def test_what_is_launched(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)  # here, on a machine without GPUs
    text, file = launched(CASES[name], tmp_path / "home"), GOLDEN / name
    if os.environ.get("SKYMOE_GOLDEN") == "write":
        file.write_text(text)
    assert text == file.read_text()


def test_a_dry_run_leaves_nothing(tmp_path: Path) -> None:
    launched(REPORT, tmp_path / "home")
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == []


@pytest.mark.parametrize("name", CASES)
def test_bash_reads_it(name: str) -> None:
    subprocess.run(["bash", "-n", GOLDEN / name], check=True)


def training_script(overrides: list[str], home: Path) -> str:
    text = launched(overrides, home)
    return text[text.index("#!/bin/bash", text.index("# training")) :]


@pytest.fixture
def fake_slurm(tmp_path: Path) -> dict[str, Any]:
    """Commands that write down their arguments; the srun of a rank fails as $CODE says, squeue knows $STATE and the rest."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, then in {
        "srun": 'case "$*" in *fdl_runner*|*nemo_skymoe.bridge*) exit $CODE;; esac',
        "scontrol": "",
        "squeue": 'echo "$STATE $(date --date "$LEFT seconds" +%FT%T) $PREEMPTED"',
    }.items():
        (folder / name).write_text(f'#!/bin/bash\necho {name} "$@" >> {tmp_path}/calls\n{then}\n')
        (folder / name).chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-192]"}


DAY = {"CODE": "0", "STATE": "RUNNING", "LEFT": "80000", "PREEMPTED": "None"}


@pytest.mark.parametrize("door", ["nemo", "bridge"])
@pytest.mark.parametrize(
    ("given", "retries", "requeued"),
    [
        ({}, 0, False),  # done before the limit
        ({"LEFT": "590"}, 0, True),  # stopped by it
        ({"LEFT": "655"}, 0, True),  # up to a minute early
        ({"PREEMPTED": "2026-01-01T00:00:00"}, 0, True),
        ({"STATE": "CANCELLED", "LEFT": "0"}, 0, False),
        ({"STATE": "PENDING", "LEFT": "0"}, 0, False),  # SLURM was faster
        ({"CODE": "1"}, 0, False),
        ({"CODE": "1"}, 2, True),
    ],
)
def test_the_script_requeues_itself_where_it_has_to(
    door: str, given: dict[str, str], retries: int, requeued: bool, fake_slurm: dict[str, Any], tmp_path: Path
) -> None:
    script = training_script([*REPORT, f"frontdoor={door}", f"cluster.retries={retries}"], tmp_path / "home")
    variables = DAY | given
    done = subprocess.run(
        ["bash", "-c", script], env={**fake_slurm, **variables}, capture_output=True, text=True
    )
    calls = (tmp_path / "calls").read_text()
    assert done.returncode == int(variables["CODE"])
    assert ("scontrol requeue 7" in calls) == requeued
    assert "--container-image /images/skymoe.sqsh" in calls
    assert {"nemo": "fdl_runner -n training", "bridge": "-m nemo_skymoe.bridge --recipe"}[door] in calls
