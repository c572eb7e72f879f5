"""A real SLURM interrupts a training in every way, and the result is that of a training left alone, to the bit.

Through each front door there are three runs: one that nothing happens to, on two nodes; one by sbatch that is stopped by
its time limit; one by NeMo-Run that is preempted, and whose node is then lost.
"""

import time
from pathlib import Path

import pytest

from nemo_skymoe.checkpoint.verification.verifier import verify
from tests.slurm.cluster import NODES, Cluster
from tests.slurm.doors import NEMO, SAVED_EVERY, STEPS, Door, bridge
from tests.slurm.jobs import SECONDS, Job, Kept
from tests.waiting import wait_until


@pytest.fixture(scope="module", params=["nemo", "bridge"])
def door(request: pytest.FixtureRequest, cluster: Cluster) -> Door:
    """The front door of the trainings."""
    return NEMO if request.param == "nemo" else bridge(cluster.environment["PATH"])


@pytest.fixture(scope="module")
def runs(door: Door, folder: Path) -> Path:
    """The folder of one door's runs, with the corpus of all."""
    made = folder / door.name
    made.mkdir()
    (made / "corpus").symlink_to(folder / "corpus")
    return made


@pytest.fixture(scope="module")
def whole(cluster: Cluster, runs: Path, door: Door) -> Kept:
    """The run that nothing happens to, one rank on each of two nodes."""
    job = door.sbatch(cluster, runs, "whole", nodes=2, devices=1)
    job.wait_for_success()
    assert job.shown()["Restarts"] == "0"
    found = door.kept(runs, "whole")
    assert list(found.losses) == list(range(STEPS)) and list(found.logged) == list(range(1, STEPS + 1))
    assert len(set(found.logged.values())) == STEPS, "the coefficients did not change every step"
    assert len(set(found.coefficients.values())) == len(found.coefficients) > 1, (
        "all layers have the same coefficient"
    )
    return found


def assert_the_same(found: Kept, whole: Kept) -> None:
    """All that was logged and the last checkpoint are those of the uninterrupted run."""
    assert found.losses == {step: loss for step, loss in whole.losses.items() if step in found.losses}
    assert found.logged == {step: values for step, values in whole.logged.items() if step in found.logged}
    assert found.coefficients == whole.coefficients
    assert found.parameters.keys() == whole.parameters.keys()
    assert [
        name for name, tensor in whole.parameters.items() if not tensor.equal(found.parameters[name])
    ] == []


def test_a_job_of_sbatch_that_its_time_limit_stops(
    cluster: Cluster, runs: Path, door: Door, whole: Kept
) -> None:
    job = door.sbatch(cluster, runs, "limited")
    job.wait_for_step(3)
    # SLURM itself sends the signal, a minute before the end that is now near.
    minutes = int(job.shown()["RunTime"].split(":")[1])
    cluster.run("scontrol", "update", f"JobId={job.number}", f"TimeLimit={minutes + 2}")
    job.wait_for_requeue(1)
    stopped_in = door.saved_step(runs, "limited")
    assert 3 < stopped_in == job.step() + (not door.logs_the_last_step) < STEPS - 1
    job.start_now("TimeLimit=60")
    job.wait_for_success()
    assert job.shown()["Restarts"] == "1"
    found = door.kept(runs, "limited")
    unlogged = set() if door.logs_the_last_step else {stopped_in}
    assert list(found.losses) == [step for step in range(STEPS) if step not in unlogged]
    assert list(found.logged) == list(whole.logged)
    assert_the_same(found, whole)


def test_a_job_of_nemo_run_that_is_preempted_and_loses_its_node(
    cluster: Cluster, runs: Path, door: Door, whole: Kept
) -> None:
    job, export = door.submit(cluster, runs, "preempted")
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
    assert 3 < door.saved_step(runs, "preempted") == job.step() + (not door.logs_the_last_step)
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
    assert_the_same(door.kept(runs, "preempted"), whole)

    export.wait_for_success()
    assert verify({"base": runs / "runs" / "preempted"}, runs / "preempted-hf").problems == []
    cluster.start_node(lost)  # for the other door
    wait_until("the node's return", lambda: cluster.node(lost).startswith("IDLE"), SECONDS, pause=0.5)


def test_a_cancelled_job_stays_cancelled(cluster: Cluster, runs: Path, door: Door) -> None:
    """The script of the job above once more, which requeues itself where it was not asked to end."""
    (script,) = (door.home(runs) / "experiments" / "skymoe").glob("*/*training*.sh")
    number = int(cluster.run("sbatch", "--parsable", str(script)))
    job = Job(cluster, number, runs / "nothing", door.step, door.first_step)
    job.wait("a start", lambda: job.shown()["JobState"] == "RUNNING")
    time.sleep(3)  # until it is past its first lines
    cluster.run("scancel", str(number))
    job.wait(
        "the end of its last process", lambda: not cluster.run("squeue", "--noheader", f"--job={number}")
    )
    assert job.shown()["JobState"] == "CANCELLED" and job.shown()["Restarts"] == "0"
