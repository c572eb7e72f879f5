"""`python -m nemo_skymoe.bridge --recipe NAME [KEY=VALUE ...]` trains with Megatron-Bridge.

It is started by itself for one rank, by torchrun or by SLURM's srun for more.
"""

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.durable.errors import CheckpointError
from nemo_skymoe.experiments import catalogue
from nemo_skymoe.experiments.command_line import split

PROGRAM = "python -m nemo_skymoe.bridge"


def main(words: Sequence[str] | None = None) -> int:
    """Do what the command line says, and return the exit status. What is wrong is said in one sentence."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    options = _parser().parse_args(words)
    try:
        if options.list:
            print(listing())
        elif options.recipe is None:
            raise ConfigurationError("--recipe is missing, expected a name: --list shows all")
        else:
            train(options.recipe, options.options, dry_run=options.dry_run)
    except (ConfigurationError, CheckpointError) as refused:
        print(f"{PROGRAM}: {refused}", file=sys.stderr)
        return 1
    return 0


def listing() -> str:
    """Return all recipes with their short names and what they do."""
    lines = []
    for short, full in catalogue.SHORT_NAMES.items():
        summary = (catalogue.RECIPES[full].__doc__ or "").partition("\n")[0]
        lines += [short, f"    {full}", f"    {summary}"]
    return "\n".join(lines)


def train(recipe: str, words: Sequence[str], *, dry_run: bool) -> None:
    """Train, or print the resolved configuration after all checks.

    Raises:
        ConfigurationError: The training cannot work. Nothing was started.
        CheckpointError: A checkpoint cannot be read.
    """
    arguments, overrides = split(recipe, words)
    chosen = catalogue.RECIPES[catalogue.full_name(recipe)](**arguments)
    ranks = chosen.run.num_nodes * chosen.run.num_gpus_per_node
    if dry_run:
        os.environ.setdefault("WORLD_SIZE", str(ranks))
    try:
        from nemo_skymoe.bridge import registration  # noqa: F401 (before anything else of Bridge is imported)
        from nemo_skymoe.bridge.checks import check
        from nemo_skymoe.bridge.overrides import set_options
        from nemo_skymoe.bridge.recipes import configured
        from nemo_skymoe.bridge.training import finetune, pretrain
    except ModuleNotFoundError as missing:
        if (missing.name or "").startswith("nemo_skymoe"):
            raise
        raise ConfigurationError(
            f"the training needs {missing.name}, which is not installed: nemo-skymoe[bridge], or a container of 26.08"
        ) from None
    config = configured(chosen)
    set_options(config, overrides)
    if dry_run:
        check(config)
        config.print_yaml()
        print("# All checks have passed. Nothing was started.")
        return
    start: Any = pretrain if catalogue.task_of(recipe) == "pretrain" else finetune
    start(config)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=PROGRAM, description="Train a Skywork-MoE with Megatron-Bridge.")
    parser.add_argument("--recipe", metavar="NAME", help="full or short name of the recipe")
    parser.add_argument("--list", action="store_true", help="print the recipes, and do nothing")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="run all checks, print the resolved configuration, and train nothing",
    )
    parser.add_argument(
        "options",
        nargs="*",
        metavar="KEY=VALUE",
        help="an argument of the recipe (corpus=DIR, scale=toy, resume_path=DIR, dir=DIR), or an option of Bridge"
        " (train.train_iters=100)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
