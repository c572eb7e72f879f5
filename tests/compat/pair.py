"""The steps for one pair of NeMo and megatron-core, run in their environment: python -m tests.compat.pair RESULT.json

Every module of nemo_skymoe is imported, every recipe dry-run and two of them trained, by the commands a user types,
forked from this process, which imports NeMo once. Whatever fails ends it.
"""

import importlib
import json
import pkgutil
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import nemo_skymoe
from nemo_skymoe.patches import unified_memory

unified_memory.apply()  # before commands imports Megatron

from nemo_skymoe.data.corpus import build_corpus  # noqa: E402
from nemo_skymoe.ranks import RankFailed  # noqa: E402
from nemo_skymoe.recipes.registry import FIXED  # noqa: E402
from tests.recipes.commands import last_checkpoint, losses, nemo_llm  # noqa: E402

ROOT = Path(__file__).parents[2]
STEPS, CUT = 6, 3
TINY = {"seq_length": 64, "warmup_steps": 1, "val_check_interval": CUT, "limit_val_batches": 1}


def import_everything() -> int:
    """Modules of the package that were imported, `__main__` aside, which would run."""
    names = [
        module.name
        for module in pkgutil.walk_packages(nemo_skymoe.__path__, "nemo_skymoe.")
        if not module.name.endswith("__main__")
    ]
    for name in names:
        importlib.import_module(name)
    return len(names)


def dry_run_everything(folder: Path) -> int:
    """Recipes that `nemo llm KIND --factory NAME --dryrun` resolves; a name that does not exist it must refuse."""
    commands = [("pretrain", recipe.name) for recipe in FIXED]
    commands += [("finetune", recipe.name) for recipe in FIXED if recipe.finetune]
    for kind, name in commands:
        nemo_llm(folder, kind, name, "--dryrun", ranks=1)
    try:
        nemo_llm(folder, "pretrain", "no_such_recipe", "--dryrun", ranks=1)
    except RankFailed:
        return len(commands)
    raise AssertionError("a dry run of a recipe that does not exist succeeded")


def train_and_resume(folder: Path) -> list[float]:
    """Losses of `skywork_moe_tiny` on 2 ranks with EDP: `CUT` steps, a checkpoint, and the steps after it."""
    name, every_step = "skywork_moe_tiny", "trainer.log_every_n_steps=1"
    nemo_llm(folder, "pretrain", name, every_step, max_steps=CUT, **TINY)
    begun = losses(folder, name)
    assert (last_checkpoint(folder, name) / "weights").is_dir()
    shutil.rmtree(folder / "runs" / "tensorboard" / name)
    nemo_llm(folder, "pretrain", name, every_step, max_steps=STEPS, **TINY)
    resumed = losses(folder, name)
    assert (len(begun), len(resumed)) == (CUT, STEPS - CUT), (
        "the second command did not go on from the checkpoint"
    )
    return begun + resumed


def train_experts_at_their_own_rate(folder: Path) -> list[float]:
    """Losses of figure 7's recipe, whose experts learn at a quarter of the rate; the last step's rate is zero."""
    recipe = "skywork_moe_1p8b"
    nemo_llm(folder, "pretrain", recipe, scale="toy", learning_rates="expert", name="rates")
    return losses(folder, "rates")


def timed(function: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
    begin = time.monotonic()
    result = function(*arguments)
    seconds = round(time.monotonic() - begin)
    return {"losses": result, "seconds": seconds}


def main(result: Path) -> None:
    assert Path(nemo_skymoe.__file__).is_relative_to(ROOT), f"{nemo_skymoe.__file__} is another checkout's"
    with TemporaryDirectory() as name:
        folder = Path(name)
        files = [f"{file}.py" for file in ("argparse", "typing", "inspect", "pydoc", "shutil", "uuid", "ast")]
        build_corpus(folder / "runs" / "corpus", 512, 0.3, files=files)
        try:
            found: dict[str, Any] = {"modules": import_everything(), "dry_runs": dry_run_everything(folder)}
            found["tiny"] = timed(train_and_resume, folder)
            found["rates"] = timed(train_experts_at_their_own_rate, folder)
        except RankFailed:
            print("\n".join((folder / "rank0.log").read_text().splitlines()[-40:]))
            raise
    result.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
