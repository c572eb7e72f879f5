"""Stages as one NeMo-Run experiment: submitted, or printed as the commands and scripts that would be."""

import shlex
from collections.abc import Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import nemo_run as run
from torchx.specs import AppState

from nemo_skymoe.launch.comments import commented
from nemo_skymoe.launch.stages import Stage
from nemo_skymoe.nemo.failure import first_failure
from nemo_skymoe.ranks import RankFailed
from nemo_skymoe.shell import word

TITLE = "skymoe"


def submit(stages: Sequence[Stage]) -> None:
    """Run the stages one after the other: on SLURM as dependent jobs, left alone once submitted; here by waiting.

    Raises:
        RankFailed: A stage that ran here failed, the later ones were not started.
    """
    if isinstance(stages[0].executor, run.SlurmExecutor):
        with run.Experiment(TITLE) as experiment:
            _add(experiment, stages)
            experiment.run(detach=True)
        return
    for stage in stages:
        with run.Experiment(TITLE) as experiment:
            _add(experiment, [stage])
            experiment.run(tail_logs=True)
        (job,) = experiment.jobs
        if job.state is not AppState.SUCCEEDED:
            failure = first_failure(Path(job.executor.job_dir)) or "its output is above"
            raise RankFailed(f"{stage.name} ended as {job.state.name}: {failure}")


def dry_run(stages: Sequence[Stage]) -> str:
    """What `submit` would run: a commented script for sbatch, or a torchrun command, for every stage. Nothing is left."""
    with redirect_stdout(StringIO()), run.Experiment(TITLE) as experiment:
        _add(experiment, stages)
        experiment.dryrun(log=False)
        jobs: list[Any] = experiment.jobs
        requests = [job._dryrun_info.request for job in jobs]  # what it would have logged
    parts = []
    for stage, before, request in zip(stages, (None, *stages), requests, strict=False):
        after = f", once {before.name} has succeeded" if before else ""
        show = _script if isinstance(stage.executor, run.SlurmExecutor) else _command
        parts.append(f"# {stage.name}{after}\n# {stage.summary}\n{show(request, stage, before)}")
    return "\n".join(parts)


def _add(experiment: run.Experiment, stages: Sequence[Stage]) -> None:
    previous: list[str] = []
    for stage in stages:
        task = experiment.add(
            stage.task, executor=stage.executor, name=stage.name, plugins=stage.plugins, dependencies=previous
        )
        previous = [task]


def _script(request: Any, stage: Stage, before: Stage | None) -> str:
    waits = f" --dependency={stage.executor.dependency_type}:{before.name.upper()}_JOB" if before else ""
    return f"# {shlex.join(request.launch_cmd)}{waits} SCRIPT\n{commented(request.materialize())}\n"


def _command(request: Any, stage: Stage, before: Stage | None) -> str:
    (replicas,) = request.role_params.values()
    variables = {name: value for name, value in stage.executor.env_vars.items() if value is not None}
    exports = [f"export {name}={word(value)}" for name, value in variables.items()]
    return commented("\n".join([*exports, " ".join(map(word, replicas[0].args))])) + "\n"
