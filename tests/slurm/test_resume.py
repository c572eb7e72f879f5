"""What a real SLURM does to a training, and that nothing of it is to be seen in the result, to the bit.

The runs: one that nothing happens to, on two nodes; one by sbatch that is stopped by its time limit; one by NeMo-Run that
is preempted, and whose node is then lost.
"""

import time
from pathlib import Path

import pytest

from nemo_skymoe.checkpoint.verification.verifier import verify
from tests.slurm.cluster import NODES, Cluster
from tests.slurm.jobs import SECONDS, Job, Kept, checkpoint, kept
from tests.waiting import wait_until

SLURM = Path(__file__).resolve().parents[2] / "slurm"
# SLURM looks at time limits every 30 seconds: so long must these steps take, and some more.
STEPS, SAVED_EVERY = 80, 20
RECIPE = {
    "max_steps": STEPS,
    "seq_length": 64,
    "global_batch_size": 64,
    "warmup_steps": 1,
    "val_check_interval": STEPS,
    "limit_val_batches": 1,
    "similarity_interval": STEPS,
    "expert_capacity_factor": 1.0,
}
PARTS = {"trainer.log_every_n_steps": 1, "log.ckpt.every_n_train_steps": SAVED_EVERY}
# The coefficients follow the drop rate fast and far enough to tell steps and layers apart.
MODEL = {"moe_adaptive_aux_loss_smoothing": 0.5, "moe_adaptive_aux_loss_maximum": 1.0}


def pretrain_sbatch(cluster: Cluster, folder: Path, name: str, nodes: int = 1, devices: int = 2) -> Job:
    """Submit slurm/pretrain.sbatch as a user without Python would."""
    recipe = {"dir": folder / "runs", "name": name, "corpus": folder / "corpus", "devices": devices, **RECIPE}
    arguments = ",".join(f"{option}={value}" for option, value in recipe.items())
    options = [
        "--account=llm",
        "--partition=a800",
        "--time=60",
        "--signal=B:USR1@60",
        f"--output={folder}/{name}.%j.out",
    ]
    sizes = [f"--nodes={nodes}", f"--ntasks-per-node={devices}", f"--gpus-per-node={devices}"]
    parts = PARTS | {f"model.config.{option}": value for option, value in MODEL.items()}
    number = cluster.run(
        "sbatch", "--parsable", *options, *sizes, str(SLURM / "pretrain.sbatch"), f"skywork_moe_tiny({arguments})",
        *(f"{option}={value}" for option, value in parts.items()),
    )  # fmt: skip
    return Job(cluster, int(number), folder / f"{name}.{int(number)}.out")


def launch(cluster: Cluster, folder: Path, name: str) -> tuple[Job, Job]:
    """Submit the same by `skymoe launch`, and an export of what it trains."""
    recipe = {"dir": folder / "runs", "name": name, **RECIPE, **PARTS}
    values = {f"training.{option}": value for option, value in recipe.items()}
    values |= {f"model.{option}": value for option, value in MODEL.items()}
    cluster.run(
        "skymoe", "launch", "jobs=[training,export]", f"export.output_path={folder}/{name}-hf",
        "training=skywork_moe_tiny", "cluster=a800_slurm", "cluster.time=01:00:00",
        "data=corpus", f"data.corpus={folder}/corpus", *(f"{option}={value}" for option, value in values.items()),
    )  # fmt: skip
    (scripts,) = (folder / "home" / "experiments" / "skymoe").iterdir()
    training, export = (
        Job(
            cluster,
            int(cluster.run("squeue", "--noheader", "--format=%i", f"--name=skymoe.{job}")),
            scripts / job / "log-*.out",
        )
        for job in ("training", "export")
    )
    return training, export


@pytest.fixture(scope="module")
def whole(cluster: Cluster, folder: Path) -> Kept:
    """The run that nothing happens to, one rank on each of two nodes."""
    job = pretrain_sbatch(cluster, folder, "whole", nodes=2, devices=1)
    job.wait_for_success()
    assert job.shown()["Restarts"] == "0"
    found = kept(folder / "runs", "whole")
    assert list(found.losses) == list(range(STEPS)) and list(found.logged) == list(range(1, STEPS + 1))
    assert len(set(found.logged.values())) == STEPS, "the coefficients did not change every step"
    assert len(set(found.coefficients.values())) == len(found.coefficients) > 1, (
        "all layers have the same coefficient"
    )
    return found


def last_step(folder: Path, name: str) -> int:
    """The optimizer step after which the last checkpoint of a run was saved, counted from 0: its name says so."""
    return int(checkpoint(folder / "runs", name).name.removeprefix("step=").removesuffix("-last"))


def assert_the_same(found: Kept, whole: Kept) -> None:
    """All that was logged and the last checkpoint are those of the uninterrupted run."""
    assert found.losses == {step: loss for step, loss in whole.losses.items() if step in found.losses}
    assert found.logged == {step: values for step, values in whole.logged.items() if step in found.logged}
    assert found.coefficients == whole.coefficients
    assert found.parameters.keys() == whole.parameters.keys()
    assert [
        name for name, tensor in whole.parameters.items() if not tensor.equal(found.parameters[name])
    ] == []


def test_a_job_of_sbatch_that_its_time_limit_stops(cluster: Cluster, folder: Path, whole: Kept) -> None:
    job = pretrain_sbatch(cluster, folder, "limited")
    job.wait_for_step(3)
    # SLURM itself sends the signal, a minute before the end that is now near.
    minutes = int(job.shown()["RunTime"].split(":")[1])
    cluster.run("scontrol", "update", f"JobId={job.number}", f"TimeLimit={minutes + 2}")
    job.wait_for_requeue(1)
    stopped_in = last_step(folder, "limited")
    assert 3 < stopped_in == job.step() + 1 < STEPS - 1
    job.start_now("TimeLimit=60")
    job.wait_for_success()
    assert job.shown()["Restarts"] == "1"
    found = kept(folder / "runs", "limited")
    # NeMo's callback leaves before Lightning has printed and logged that step.
    assert list(found.losses) == [step for step in range(STEPS) if step != stopped_in]
    assert list(found.logged) == list(whole.logged)
    assert_the_same(found, whole)


def test_a_job_of_nemo_run_that_is_preempted_and_loses_its_node(
    cluster: Cluster, folder: Path, whole: Kept
) -> None:
    job, export = launch(cluster, folder, "preempted")
    job.wait_for_step(3)
    # Ends well within its grace time, which SLURM would call complete.
    urgent = int(
        cluster.run(
            "sbatch",
            "--parsable",
            "--partition=urgent",
            "--nodes=2",
            "--exclusive",
            "--output=/dev/null",
            "--wrap=true",
        )
    )
    job.wait_for_requeue(1)
    assert 3 < last_step(folder, "preempted") == job.step() + 1
    assert export.shown()["JobState"] == "PENDING"
    wait_until("the urgent job", lambda: cluster.job(urgent)["JobState"] == "COMPLETED", SECONDS, pause=0.5)
    job.start_now()
    # Past another checkpoint, some steps of which are lost with the node.
    job.wait_for_step(min(STEPS - SAVED_EVERY, job.step() + SAVED_EVERY + 3))

    lost = job.shown()["NodeList"]
    cluster.kill_node(lost)
    job.wait_for_requeue(2)
    wait_until("a node that is down", lambda: cluster.node(lost).startswith("DOWN"), SECONDS, pause=0.5)
    job.start_now()
    job.wait_for_success()
    (other,) = set(NODES) - {lost}
    assert job.shown()["NodeList"] == other and job.shown()["Restarts"] == "2"
    assert_the_same(kept(folder / "runs", "preempted"), whole)

    export.wait_for_success()
    assert verify({"base": folder / "runs" / "preempted"}, folder / "preempted-hf").problems == []


def test_a_cancelled_job_stays_cancelled(cluster: Cluster, folder: Path) -> None:
    """The script of the job above once more, which requeues itself where it was not asked to end."""
    (script,) = (folder / "home" / "experiments" / "skymoe").glob("*/*training*.sh")
    number = int(cluster.run("sbatch", "--parsable", str(script)))
    job = Job(cluster, number, folder / "nothing")
    job.wait("a start", lambda: job.shown()["JobState"] == "RUNNING")
    time.sleep(3)  # until it is past its first lines
    cluster.run("scancel", str(number))
    job.wait(
        "the end of its last process", lambda: not cluster.run("squeue", "--noheader", f"--job={number}")
    )
    assert job.shown()["JobState"] == "CANCELLED" and job.shown()["Restarts"] == "0"
