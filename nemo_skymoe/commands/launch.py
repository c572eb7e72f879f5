"""`skymoe launch` translates hydra groups into a NeMo-Run experiment."""

import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nemo_skymoe.commands.front_ends import Command
from nemo_skymoe.config import ConfigurationError

if TYPE_CHECKING:
    from nemo_skymoe.launch.jobs import Job


@dataclass(frozen=True, kw_only=True)
class LaunchOptions:
    """Launch the jobs of an experiment on a cluster.

    The groups cluster, training, data, model, conversion, upcycle, plan and export work as in the NeMo launcher. They
    name recipes, executors and commands in Python, and you may give any of their arguments. For the report's run:

    skymoe launch training=skywork_moe_146b cluster=a800_slurm jobs=[upcycle,training]
    upcycle.source=/data/skywork-13b upcycle.output_path=/data/upcycled training.dir=/data/runs --dry-run
    """

    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="GROUP=NAME, GROUP.KEY=VALUE or jobs=[...], as hydra reads them."),
    ] = None
    config_dir: Annotated[
        Path | None, typer.Option(help="A site's own folder of groups, which is added to the installed ones.")
    ] = None
    cfg: Annotated[
        str | None, typer.Option(help="With job, print the composed configuration and do nothing.")
    ] = None
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the scripts and commands, and run nothing.")
    ] = False


def launch(options: LaunchOptions) -> None:
    """Print what was asked for, or submit the jobs."""
    if options.cfg not in (None, "job"):
        raise ConfigurationError(f"--cfg is {options.cfg!r}, expected job")
    try:
        from nemo_skymoe.launch.composition import compose_groups
    except ModuleNotFoundError as missing:
        raise ConfigurationError(
            f"launch needs {missing.name}, which is not installed: nemo-skymoe[nemo]"
        ) from None
    composed = compose_groups(options.overrides or [], options.config_dir)
    if options.cfg:
        from omegaconf import OmegaConf

        typer.echo(OmegaConf.to_yaml(composed), nl=False)
        return
    with redirect_stdout(
        sys.stderr
    ):  # libraries log while they load and check, which is not part of the answer
        from nemo_skymoe.launch import experiment

        made = jobs(composed)
    if options.dry_run:
        typer.echo(experiment.dry_run(made), nl=False)
    else:
        experiment.submit(made)


def jobs(composed: Any) -> "list[Job]":
    """Return the jobs of a composed configuration. Those that are not trainings run commands of `skymoe`."""
    from nemo_skymoe.commands import tasks
    from nemo_skymoe.launch.jobs import jobs

    named = {
        "conversion": tasks.convert,
        "upcycle": tasks.upcycle,
        "plan": tasks.plan,
        "export": tasks.convert,
    }
    return jobs(composed, named)


COMMANDS = (Command("launch", LaunchOptions, launch),)
