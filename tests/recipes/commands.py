"""The commands a user types, forked from this process, which has imported NeMo once."""

import os
import sys
from pathlib import Path
from typing import Any

from nemo_skymoe import nemo_cli  # noqa: F401
from nemo_skymoe.ranks import run_ranks
from nemo_skymoe.report.curves import read_curves

_SAID = 40
"""Lines of a rank's log that a failure repeats."""


def nemo_llm(folder: Path, kind: str, recipe: str, *more: str, ranks: int = 2, **arguments: Any) -> None:
    """`nemo llm KIND --factory "RECIPE(arguments)" --yes`, in `folder`, on `ranks` ranks as torchrun starts them."""
    chosen = ",".join(f"{key}={value}" for key, value in arguments.items())
    command = ["nemo", "llm", kind, "--factory", f"{recipe}({chosen})", "--yes", *more]
    run_ranks(_nemo, ranks, folder, command, env={"NEMORUN_HOME": str(folder / "nemo_run")})


def skymoe(folder: Path, *arguments: str) -> None:
    """`skymoe ARGUMENTS` in `folder`."""
    run_ranks(_skymoe, 1, folder, list(arguments))


def losses(folder: Path, name: str) -> list[float]:
    """Of every step of the run `name`."""
    return list(read_curves(folder / "runs" / "tensorboard" / name)["reduced_train_loss"].values)


def last_checkpoint(folder: Path, name: str) -> Path:
    """What the run `name` left."""
    found = (folder / "runs" / name / "checkpoints").glob("*-last")
    return max(found, key=lambda path: path.stat().st_mtime)


def _nemo(folder: Path, command: list[str]) -> None:
    _begin(folder, f"rank{os.environ['RANK']}.log")
    sys.argv = command
    from nemo_run.cli.api import create_cli

    _succeeded(create_cli()(standalone_mode=False))


def _skymoe(folder: Path, arguments: list[str]) -> None:
    _begin(folder, "skymoe.log")
    from nemo_skymoe.cli import app

    _succeeded(app(arguments, standalone_mode=False))


def _succeeded(code: int | None) -> None:
    if code:
        said = Path(sys.stdout.name).read_text().splitlines()[-_SAID:]
        raise RuntimeError("\n".join([f"exit code {code}, after", *said]))


def _begin(folder: Path, log: str) -> None:
    os.chdir(folder)
    # Lines, not blocks: os._exit ends these processes.
    sys.stdout = sys.stderr = open(log, "a", buffering=1)  # noqa: SIM115
    os.dup2(sys.stdout.fileno(), 1)
    os.dup2(sys.stdout.fileno(), 2)
