"""Submitted for good: to an sbatch that only writes down what it gets, and to processes of this machine."""

import os
import sys
from pathlib import Path

import pytest

from nemo_skymoe.commands.launch import jobs
from nemo_skymoe.launch.composition import compose_groups
from nemo_skymoe.launch.experiment import submit
from nemo_skymoe.ranks import RankFailed


@pytest.fixture
def sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which the n-th call of sbatch becomes n, arguments and script; it answers with job 40 + n."""
    folder, given = tmp_path / "bin", tmp_path / "given"
    folder.mkdir()
    given.mkdir()
    (folder / "sbatch").write_text(
        f'#!/bin/bash\nn=$(( $(ls {given} | wc -l) + 1 ))\n{{ echo "$@"; cat "${{@: -1}}"; }} > {given}/$n\necho $((40 + n))\n'
    )
    (folder / "squeue").write_text("#!/bin/bash\n")
    for command in folder.iterdir():
        command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return given


def test_on_slurm_a_job_waits_for_the_one_before_it(sbatch: Path) -> None:
    submit(
        jobs(
            compose_groups(
                [
                    "jobs=[conversion,upcycle,training]",
                    "training=skywork_moe_146b",
                    "cluster=a800_slurm",
                    "conversion.source=/data/hf",
                    "conversion.output_path=/data/dense",
                    "upcycle.output_path=/data/upcycled",
                    "training.dir=/data/runs",
                ]
            )
        )
    )
    first, second, third = ((sbatch / str(n)).read_text() for n in (1, 2, 3))
    assert "--dependency" not in first and "-n conversion" in first
    assert " --dependency=afterok:41 " in second.splitlines()[0] and "-n upcycle" in second
    assert " --dependency=afterok:42 " in third.splitlines()[0] and "#SBATCH --nodes=192\n" in third


@pytest.mark.long  # a process that loads NeMo-Run
def test_here_a_failed_job_is_the_last_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    given = [
        "jobs=[conversion,upcycle]",
        f"conversion.source={tmp_path}/absent",
        f"upcycle.output_path={tmp_path}/up",
    ]
    reason = rf"conversion ended as FAILED: CheckpointError: .*{tmp_path}/absent.*; its log is (/\S+)$"
    with pytest.raises(RankFailed, match=reason) as failed:
        submit(jobs(compose_groups([*given, f"conversion.output_path={tmp_path}/dense"])))
    assert f"{tmp_path}/absent" in Path(str(failed.value).split()[-1]).read_text()
    assert not (tmp_path / "up").exists() and not (tmp_path / "dense").exists()
