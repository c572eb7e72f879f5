"""Make the recipe of a composed configuration, and run the training's own checks where it is launched."""

import importlib
import inspect
from collections.abc import Callable
from typing import Any

from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.experiments.arguments import check_renamed
from nemo_skymoe.launch.sections import MISSING, check_missing, configure, set_values
from nemo_skymoe.names import unknown
from nemo_skymoe.nemo.pipeline import PipelinePlan
from nemo_skymoe.nemo.recipe_check import check_made
from nemo_skymoe.recipes.registry import RECIPES

_RECIPES = {recipe.name: recipe for recipe in RECIPES}


def make_recipe(values: dict[str, Any], checkpoint: str | None) -> Any:
    """Make the recipe of the groups training, data and model. It starts from `checkpoint`, unless it is given another.

    Raises:
        ConfigurationError: A recipe, an option or a part does not exist, or a value does not fit.
    """
    section, data = dict(values["training"]), dict(values["data"])
    name, kind = section.pop("recipe", MISSING), section.pop("task", "pretrain")
    factory = _factory(name, kind)
    known = inspect.signature(factory).parameters
    shared = {key: data.pop(key) for key in list(data) if key in known}
    if twice := sorted(shared.keys() & section.keys()):
        raise ConfigurationError(
            f"{twice[0]} is given as training.{twice[0]} and as data.{twice[0]}, expected one of them"
        )
    check_renamed(section, "training.")
    check_missing("data", shared)
    if checkpoint is not None:
        section.setdefault("resume_path", checkpoint)
    recipe = configure("training", factory, section | shared)
    set_values("data", recipe.data, data)
    set_values("model", recipe.model.config, values["model"])
    return recipe


def _factory(name: str, kind: str) -> Callable[..., Any]:
    if name not in _RECIPES:
        raise unknown("training.recipe", str(name), _RECIPES)
    factory = {"pretrain": _RECIPES[name].pretrain, "finetune": _RECIPES[name].finetune}.get(kind)
    if factory is None:
        having = sorted(each.name for each in RECIPES if each.finetune)
        raise ConfigurationError(
            f"training.task is {kind!r}, expected pretrain, or finetune for one of {', '.join(having)}"
        )
    return getattr(importlib.import_module(f"nemo_skymoe.recipes.{_RECIPES[name].module}"), factory)


def check_recipe(recipe: Any, plan: PipelinePlan | None) -> str:
    """Run the checks of the training on what the recipe builds, and return its ranks in words.

    Args:
        plan: The recipe's pipeline plan, if it is known: a file may not be written yet.

    Raises:
        ConfigurationError: The training would refuse the recipe.
    """
    trainer = check_made(recipe, plan)
    strategy, world = trainer.strategy, trainer.num_nodes * trainer.num_devices
    tensor, stages = strategy.tensor_model_parallel_size, strategy.pipeline_model_parallel_size
    data = world // (tensor * stages * strategy.context_parallel_size)
    return (
        f"{trainer.num_nodes} x {trainer.num_devices} = {world} ranks, PP {stages} x TP {tensor} x DP {data},"
        f" EP {strategy.expert_model_parallel_size}"
    )
