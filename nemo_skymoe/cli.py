"""The `skymoe` command. Every heavy import waits inside the command that needs it."""

import logging
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from nemo_skymoe import __version__
from nemo_skymoe.commands import advice, checkpoint, data, evaluation, launch, pipeline
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


@app.command()
def doctor(
    json: Annotated[bool, typer.Option("--json", help="Print the same as JSON.")] = False,
    patches: Annotated[bool, typer.Option("--patches", help="Also why each patch is needed.")] = False,
) -> None:
    """Check this installation.

    Shows what is installed, whether it works together (the exit code is 1 if not), and which patches apply.
    """
    from nemo_skymoe import diagnosis

    found = diagnosis.diagnose()
    if json:
        diagnosis.show_json(found)
    else:
        diagnosis.show(found, patches)
    raise typer.Exit(0 if found.verdict.supported else 1)


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for corpus, runs and report.")] = Path("runs/demo"),
    quick: Annotated[bool, typer.Option("--quick", help="Fewer steps.")] = False,
) -> None:
    """Train, upcycle and compare small models here."""
    from nemo_skymoe.demo import story

    story.run(output, quick)


@app.command()
def corpus(
    directory: Annotated[Path, typer.Argument(help="Folder to write.")],
    vocab_size: Annotated[int, typer.Option(help="Tokens of the tokenizer to train.")] = 2048,
) -> None:
    """Make the demonstration corpus.

    Its text are the sources of Python's standard library.
    """
    from nemo_skymoe.data.corpus import build_corpus

    made = build_corpus(directory, vocab_size, progress=typer.echo)
    typer.echo(f"{made.directory}: {made.train_tokens} tokens to train on, {made.valid_tokens} held out")


@app.command()
def report(
    run_dir: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    output: Annotated[Path | None, typer.Option(help="Folder for the report.")] = None,
) -> None:
    """Draw the report of a run.

    One HTML page, from nothing but the TensorBoard logs below RUN_DIR; by default RUN_DIR/report/report.html.
    """
    from nemo_skymoe.report.run import report_run

    typer.echo(report_run(run_dir, output))


for command in (
    *checkpoint.COMMANDS,
    *data.COMMANDS,
    *evaluation.COMMANDS,
    *pipeline.COMMANDS,
    *advice.COMMANDS,
    *launch.COMMANDS,
):
    app.command()(command)


def main() -> None:
    """Entry point of the `skymoe` script."""
    if not sys.warnoptions:
        # At import Megatron and NeMo warn of all that a machine without GPUs lacks; `python -W default` shows it.
        warnings.simplefilter("ignore")
        logging.getLogger("megatron.core.utils").setLevel(logging.ERROR)
    unified_memory.apply()
    app()
