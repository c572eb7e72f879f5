"""The part of the `nemo` command that this package adds through the entry-point group `nemo_run.cli`.

It registers recipe factories and `nemo skymoe`.
"""

import functools
import importlib
import re
import sys
from difflib import get_close_matches
from typing import Any

import nemo_run as run
from nemo_run.cli.api import RunContext

from nemo_skymoe.patches import checked_context, torchrun_executor, unified_memory
from nemo_skymoe.recipes.registry import RECIPES

unified_memory.apply()  # before the recipes import Megatron

from nemo.collections import llm  # noqa: E402

from nemo_skymoe.checkpoint.torch_dist.pickle_check import check_loaded  # noqa: E402
from nemo_skymoe.commands import tasks  # noqa: E402, F401
from nemo_skymoe.experiments.arguments import check_renamed  # noqa: E402
from nemo_skymoe.names import unknown  # noqa: E402
from nemo_skymoe.nemo import failure  # noqa: E402
from nemo_skymoe.nemo.options import check_overrides, refuse_secrets  # noqa: E402
from nemo_skymoe.nemo.recipe_check import check_made, check_start, plan_of  # noqa: E402
from nemo_skymoe.recipes import executors, skywork_13b, skywork_moe_146b  # noqa: E402
from nemo_skymoe.recipes.executor_ranks import follow_recipe  # noqa: E402

for module in {recipe.module for recipe in RECIPES}:
    importlib.import_module(f"nemo_skymoe.recipes.{module}")
# The name of a recipe is its model's in `nemo llm import model=...`, where no recipe is looked for.
for published in (skywork_13b, skywork_moe_146b):
    run.cli.factory(published.model, target=llm.import_ckpt, target_arg="model", name=published.NAME)
checked_context.apply(check_loaded)
torchrun_executor.apply()
failure.install()


def _guarded(upstream: Any) -> Any:
    @functools.wraps(upstream)
    def cli_execute(self: Any, fn: Any, args: list[str], *more: Any, **keywords: Any) -> Any:
        """Keep secrets from being printed or saved, and end with the reason and exit code 1 if a job fails."""
        if any(name in text for text in (self.factory or "", *args) for name in _OURS):
            refuse_secrets([f"factory={self.factory}", *args])
        failure.ended.clear()
        upstream(self, fn, args, *more, **keywords)
        if failure.ended:
            sys.exit("\n".join(f"nemo: {sentence}" for sentence in failure.ended))

    return cli_execute


def _known(upstream: Any) -> Any:
    @functools.wraps(upstream)
    def parse_fn(self: Any, fn: Any, args: list[str], **defaults: Any) -> Any:
        """Refuse a recipe's unknown option with the nearest one, and already here what its training would refuse."""
        known = {recipe.name for recipe in RECIPES}
        name = str(self.factory or "").partition("(")[0]
        if name not in known:
            try:
                return upstream(self, fn, args, **defaults)
            except ValueError as reason:
                if "No matching factory" in str(reason) and get_close_matches(name, known, cutoff=0.8):
                    raise unknown("--factory", name, known) from None
                raise
        check_renamed(re.findall(r"[(,]\s*(\w+)\s*=", str(self.factory)))
        check_overrides(upstream(self, fn, [], **defaults), args)
        made = upstream(self, fn, args, **defaults)
        check_made(made, plan_of(made))
        executor = getattr(self, "executor", None)
        follow_recipe(executor, made.trainer)
        # If the checkpoint is not on this machine, it may be where SLURM will run the training.
        check_start(made, local=isinstance(executor, run.LocalExecutor), written_before=False)
        return made

    return parse_fn


_OURS = {*(recipe.name for recipe in RECIPES), *executors.EXECUTORS}
RunContext.cli_execute = _guarded(RunContext.cli_execute)
RunContext.parse_fn = _known(RunContext.parse_fn)
