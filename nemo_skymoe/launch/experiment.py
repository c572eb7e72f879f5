"""Run jobs as one NeMo-Run experiment, or print the commands and scripts that would be run."""

import shlex
from collections.abc import Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import nemo_run as run
from torchx.specs import AppState

from nemo_skymoe.launch.comments import commented
from nemo_skymoe.launch.jobs import Job
from nemo_skymoe.nemo.failure import first_failure
from nemo_skymoe.ranks import RankFailed
from nemo_skymoe.shell import word

TITLE = "skymoe"


def submit(jobs: Sequence[Job]) -> None:
    """Run the jobs one after the other: on SLURM as dependent jobs that are left alone, here by waiting for each.

    Raises:
        RankFailed: A job that ran here failed. The later ones were not started.
    """
    if isinstance(jobs[0].executor, run.SlurmExecutor):
        with run.Experiment(TITLE) as experiment:
            _add(experiment, jobs)
            experiment.run(detach=True)
        return
    for job in jobs:
        with run.Experiment(TITLE) as experiment:
            _add(experiment, [job])
            experiment.run(tail_logs=True)
        (launched,) = experiment.jobs
        if launched.state is not AppState.SUCCEEDED:
            failure = first_failure(Path(launched.executor.job_dir)) or "its output is above"
            raise RankFailed(f"{job.name} ended as {launched.state.name}: {failure}")


def dry_run(jobs: Sequence[Job]) -> str:
    """Return what `submit` would run for every job: a commented script for sbatch, or a torchrun command.

    It leaves nothing behind.
    """
    with redirect_stdout(StringIO()), run.Experiment(TITLE) as experiment:
        _add(experiment, jobs)
        experiment.dryrun(log=False)
        launched: list[Any] = experiment.jobs
        requests = [each._dryrun_info.request for each in launched]  # what it would have logged
    parts = []
    for job, before, request in zip(jobs, (None, *jobs), requests, strict=False):
        after = f", once {before.name} has succeeded" if before else ""
        show = _script if isinstance(job.executor, run.SlurmExecutor) else _command
        parts.append(f"# {job.name}{after}\n# {job.summary}\n{show(request, job, before)}")
    return "\n".join(parts)


def _add(experiment: run.Experiment, jobs: Sequence[Job]) -> None:
    previous: list[str] = []
    for job in jobs:
        task = experiment.add(
            job.task, executor=job.executor, name=job.name, plugins=job.plugins, dependencies=previous
        )
        previous = [task]


def _script(request: Any, job: Job, before: Job | None) -> str:
    waits = f" --dependency={job.executor.dependency_type}:{before.name.upper()}_JOB" if before else ""
    return f"# {shlex.join(request.launch_cmd)}{waits} SCRIPT\n{commented(request.materialize())}\n"


def _command(request: Any, job: Job, before: Job | None) -> str:
    (replicas,) = request.role_params.values()
    variables = {name: value for name, value in job.executor.env_vars.items() if value is not None}
    exports = [f"export {name}={word(value)}" for name, value in variables.items()]
    return commented("\n".join([*exports, " ".join(map(word, replicas[0].args))])) + "\n"
