"""What the `nemo` command finds through the entry-point group `nemo_run.cli`: recipe factories and `nemo skymoe`."""

import importlib

import nemo_run as run

from nemo_skymoe.patches import checked_context, torchrun_executor, unified_memory
from nemo_skymoe.recipes.registry import RECIPES

unified_memory.apply()  # before the recipes import Megatron

from nemo.collections import llm  # noqa: E402

from nemo_skymoe.nemo import commands  # noqa: E402, F401
from nemo_skymoe.recipes import executors, skywork_13b, skywork_moe_146b  # noqa: E402, F401

for module in {recipe.module for recipe in RECIPES}:
    importlib.import_module(f"nemo_skymoe.recipes.{module}")
# The name of a recipe is its model's in `nemo llm import model=...`, where no recipe is looked for.
for published in (skywork_13b, skywork_moe_146b):
    run.cli.factory(published.model, target=llm.import_ckpt, target_arg="model", name=published.NAME)
checked_context.apply()
torchrun_executor.apply()
