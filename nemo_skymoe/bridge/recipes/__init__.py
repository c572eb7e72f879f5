"""Recipes named as Bridge names them: `<model>_<task>_<N>gpu_<gpu>_<precision>_config`, and `<model>_<task>_config`.

A recipe is a function of keywords that returns Bridge's `ConfigContainer`. Its arguments, defaults and values are those of
`nemo_skymoe.experiments.catalogue`, from which each is made.
"""

import functools
import inspect
from typing import Any

from megatron.bridge.training.config import ConfigContainer

from nemo_skymoe.bridge.recipes._finetune import finetuning
from nemo_skymoe.bridge.recipes._pretrain import pretraining
from nemo_skymoe.experiments import catalogue
from nemo_skymoe.experiments.runs import Finetuning


def configured(chosen: catalogue.Chosen) -> ConfigContainer:
    """Return Bridge's configuration of a training.

    Raises:
        ConfigurationError: A value makes no sense. The message names it.
    """
    return finetuning(chosen) if isinstance(chosen.run, Finetuning) else pretraining(chosen)


def _recipe(name: str, experiment: catalogue.Experiment) -> Any:
    @functools.wraps(experiment)
    def recipe(**arguments: Any) -> ConfigContainer:
        return configured(experiment(**arguments))

    recipe.__name__ = recipe.__qualname__ = name
    signature = inspect.signature(experiment)
    recipe.__signature__ = signature.replace(return_annotation=ConfigContainer)  # type: ignore[attr-defined]
    return recipe


RECIPES = {name: _recipe(name, experiment) for name, experiment in catalogue.RECIPES.items()}
"""The recipes by their full names."""
globals().update(RECIPES)
globals().update({short: RECIPES[full] for short, full in catalogue.SHORT_NAMES.items()})
