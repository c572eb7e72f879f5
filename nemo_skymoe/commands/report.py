"""`skymoe report`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from nemo_skymoe.commands.front_ends import Command


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Draw the report of a run.

    The report is one HTML page, by default RUN_DIR/report/report.html. It needs nothing but the TensorBoard logs below
    RUN_DIR.
    """

    run_dir: Annotated[Path, typer.Argument(help="Folder with the logs of a run.")]
    output: Annotated[Path | None, typer.Option(help="Folder for the report.")] = None


def report(options: ReportOptions) -> None:
    """Write the report, and print where it is."""
    from nemo_skymoe.report.run import report_run

    typer.echo(report_run(options.run_dir, options.output))


COMMANDS = (Command("report", ReportOptions, report),)
