"""`skymoe doctor` checks the installation, and `skymoe demo` shows what it does."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from nemo_skymoe.commands.front_ends import Command


@dataclass(frozen=True, kw_only=True)
class DoctorOptions:
    """Check this installation.

    The command shows what is installed, whether it works together (the exit code is 1 if not), and which patches apply.
    With --gpu or --ranks it then computes: a small MoE on the device and on the CPU, the dispatchers beside Megatron's, the
    tables of tensor names beside real models, and a checkpoint.
    """

    json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False
    patches: Annotated[bool, typer.Option("--patches", help="Also say why each patch is needed.")] = False
    gpu: Annotated[bool, typer.Option("--gpu", help="Also try everything on this machine's GPUs.")] = False
    ranks: Annotated[
        int | None, typer.Option(help="Also try everything on so many ranks; without --gpu on the CPU.")
    ] = None
    output: Annotated[Path, typer.Option(help="File for what was tried, to attach to an issue.")] = Path(
        "skymoe-doctor.txt"
    )


def doctor(options: DoctorOptions) -> None:
    """Print what was found; the exit code is 1 where the parts do not work together."""
    from nemo_skymoe import diagnosis

    found = diagnosis.diagnose()
    if options.json:
        diagnosis.show_json(found)
    else:
        diagnosis.show(found, options.patches)
    healthy = found.verdict.supported
    if healthy and (options.gpu or options.ranks is not None):
        from nemo_skymoe.selfcheck.run import run

        healthy = run(gpu=options.gpu, ranks=options.ranks, output=options.output)
    raise typer.Exit(0 if healthy else 1)


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """Train, upcycle and compare small models here."""

    output: Annotated[Path, typer.Option(help="Folder for corpus, runs and report.")] = Path("runs/demo")
    quick: Annotated[bool, typer.Option("--quick", help="Take 20 steps in every training.")] = False
    frontdoor: Annotated[str, typer.Option(help="Front door that trains.")] = "nemo"
    device: Annotated[str, typer.Option(help="Device to train on: cpu, or gpu, which takes two GPUs.")] = (
        "cpu"
    )


def demo(options: DemoOptions) -> None:
    """Run the demo."""
    from nemo_skymoe.demo import story

    story.run(options.output, quick=options.quick, frontdoor=options.frontdoor, device=options.device)


COMMANDS = (Command("doctor", DoctorOptions, doctor), Command("demo", DemoOptions, demo))
