"""The `skymoe` command. Every heavy import waits inside the command that needs it."""

import logging
import sys
import warnings
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from nemo_skymoe import __version__
from nemo_skymoe.commands import advice, checkpoint, data, evaluation, installation, launch, pipeline, report
from nemo_skymoe.commands.front_ends import as_typer
from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.patches import unified_memory
from nemo_skymoe.ranks import RankFailed


class _Commands(TyperGroup):
    """Turns a refused configuration, a failed rank or file and Ctrl-C into a message and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except ConfigurationError as refused:
            typer.echo(f"skymoe: {refused}", err=True)
            raise typer.Exit(2) from None
        except RankFailed as failed:
            typer.echo(f"skymoe: {failed}", err=True)
            raise typer.Exit(1) from None
        except OSError as failed:  # no room, no permission, no such file: a sentence says it all
            typer.echo(f"skymoe: {failed}", err=True)
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # half of what `--help` would take
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"nemo-skymoe {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Skywork-MoE for NVIDIA NeMo and Megatron-Core."""


for command in (
    *installation.COMMANDS,
    *data.COMMANDS,
    *report.COMMANDS,
    *checkpoint.COMMANDS,
    *evaluation.COMMANDS,
    *pipeline.COMMANDS,
    *advice.COMMANDS,
    *launch.COMMANDS,
):
    app.command()(as_typer(command))


def main() -> None:
    """Entry point of the `skymoe` script."""
    if not sys.warnoptions:
        # At import Megatron and NeMo warn of all that a machine without GPUs lacks; `python -W default` shows it.
        warnings.simplefilter("ignore")
        logging.getLogger("megatron.core.utils").setLevel(logging.ERROR)
    unified_memory.apply()
    app()
