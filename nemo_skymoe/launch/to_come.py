"""A training whose model is that of a checkpoint is launched together with the job that is going to write the checkpoint.

The model then follows from the source of that job and from its options.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import fiddle as fdl

from nemo_skymoe.checkpoint.description import Description
from nemo_skymoe.checkpoint.sources import open_source
from nemo_skymoe.checkpoint.torch_dist.names import padded_vocab_size
from nemo_skymoe.checkpoint.upcycling.options import Upcycling
from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.experiments import own_model
from nemo_skymoe.experiments.own_model import StoredModel

_RECIPES = (own_model.MOE.name, own_model.DENSE.name)


def expected(training: Mapping[str, Any], writing: Mapping[str, Any]) -> AbstractContextManager[None]:
    """Let the recipe of a training know the model in the checkpoint that is written before it.

    Args:
        training: The group training.
        writing: The tasks of the conversion and of the upcycling before it, by name and in their order.

    Raises:
        ConfigurationError: The first source is not on this machine, or the options do not fit it.
    """
    if training.get("recipe") not in _RECIPES or training.get("resume_path") is not None or not writing:
        return nullcontext()
    model: StoredModel | None = None
    for job, task in writing.items():
        options: dict[str, Any] = {
            str(name): value for name, value in fdl.ordered_arguments(task, include_defaults=True).items()
        }
        source = model.description if model is not None else _opened(job, options, str(training["recipe"]))
        model = _written(job, options, source)
    assert model is not None
    return own_model.to_come(model)


def _opened(job: str, options: Mapping[str, Any], recipe: str) -> Description:
    folder, config = Path(options["source"]).expanduser(), options["config"]
    if not folder.is_dir():
        raise ConfigurationError(
            f"{job}.source is '{options['source']}', expected a folder on this machine, because the recipe {recipe} takes"
            f" its model from it: launch jobs=[{job}] alone, and the training where its checkpoint can be seen"
        )
    return open_source(folder, None if config is None else Path(config)).description


def _written(job: str, options: Mapping[str, Any], source: Description) -> StoredModel:
    sizes = source.architecture
    if job == "upcycle":
        if sizes.num_moe_experts is not None:
            raise ConfigurationError(
                f"upcycle.source is '{options['source']}', which is an MoE, expected a dense model"
            )
        sizes = _upcycling(options).architecture(sizes)
    rows = options["vocab_size"] or padded_vocab_size(sizes.vocab_size)
    return StoredModel(options["output_path"], options["to"], replace(source, architecture=sizes), rows)


def _upcycling(options: Mapping[str, Any]) -> Upcycling:
    given = {field.name: options[field.name] for field in fields(Upcycling)}
    experts = given.pop("expert_source")
    return Upcycling(**given, expert_source=None if experts is None else tuple(experts.items()))
