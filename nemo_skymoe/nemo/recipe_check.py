"""Make the checks of a training from its recipe, where the recipe is submitted or only printed."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fiddle as fdl
from nemo.collections.common.tokenizers.null_tokenizer import NullTokenizer

from nemo_skymoe.checkpoint import tokenizer
from nemo_skymoe.checkpoint.torch_dist.pickle_check import check_checkpoint
from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.nemo import checks
from nemo_skymoe.nemo.pipeline import PipelinePlan
from nemo_skymoe.nemo.run_numbers import check_numbers
from nemo_skymoe.patches import lora_without_te


def check_made(recipe: Any, plan: PipelinePlan | None) -> Any:
    """Build the parts of a recipe that build quickly, check them as the training would, and return the trainer.

    Args:
        recipe: A Fiddle configuration of `nemo_skymoe.nemo.api.pretrain` or `finetune`. It is not changed.
        plan: The recipe's pipeline plan, if it is known: a file may not be written yet.

    Raises:
        ConfigurationError: The training would refuse the recipe.
    """
    arguments = fdl.ordered_arguments(recipe)
    checks.check_steps(recipe.trainer)
    check_numbers(recipe.model.config, recipe.trainer, recipe.data)
    config, trainer = built(recipe.model.config, "model"), built(recipe.trainer, "training.trainer")
    optim, peft, *_ = (built(arguments.get(name), f"training.{name}") for name in ("optim", "peft", "log"))
    own = built(fdl.ordered_arguments(recipe.model).get("optim"), "training.model.optim")
    if peft is not None:
        lora_without_te.apply()
    checks.check_training(_Holder(config, own), trainer, optim, plan, peft, recipe.data)
    if recipe.data.seq_length != config.seq_length:
        raise ConfigurationError(
            f"data.seq_length is {recipe.data.seq_length} and model.seq_length {config.seq_length}, expected the same:"
            " training.seq_length sets both"
        )
    return trainer


def plan_of(recipe: Any) -> PipelinePlan | None:
    """Return the pipeline plan of a recipe; None if there is none, or its file is not on this machine.

    Raises:
        ConfigurationError: The file is not a plan.
    """
    given = fdl.ordered_arguments(recipe).get("pipeline")
    if given is None or ((file := getattr(given, "file", None)) is not None and not Path(file).is_file()):
        return None
    return built(given, "pipeline")


def check_start(recipe: Any, local: bool, written_before: bool) -> None:
    """Check the checkpoint to start from, or to continue from, as the training would, if it is on this machine.

    Args:
        local: Whether the training runs on this machine, so that it would look for the checkpoint here.
        written_before: Whether a job before the training writes it.

    Raises:
        ConfigurationError: The training would refuse the checkpoint.
    """
    config, vocabulary = built(recipe.model.config, "model"), vocabulary_of(recipe.data)
    if fdl.ordered_arguments(recipe).get("peft") is None:
        checks.check_own_checkpoint(recipe.resume, recipe.log, config, vocabulary)
    path = getattr(getattr(recipe.resume, "restore_config", None), "path", None)
    if not path or "://" in path:
        return
    if (Path(path) / "weights").is_dir() or (local and not written_before):
        checks.check_warm_start(recipe.resume, config, vocabulary)
        check_checkpoint(Path(path))


def vocabulary_of(data: Any) -> int | None:
    """Return the number of tokens of the tokenizer that a recipe's data come with; None if it is not known here."""
    given = getattr(data, "tokenizer", None)
    if isinstance(given, fdl.Buildable) and given.__fn_or_cls__ is NullTokenizer:
        return given.vocab_size + 1  # it adds an end of document
    folder = getattr(data, "corpus", None)
    return None if folder is None else tokenizer.size(Path(folder).expanduser() / "tokenizer")


def built(part: Any, name: str) -> Any:
    """Build the object that a Fiddle configuration describes.

    Raises:
        ConfigurationError: Building failed. The message is one sentence with the option `name`.
    """
    if not isinstance(part, fdl.Buildable):
        return part
    try:
        return fdl.build(part)
    except ConfigurationError as refused:  # Fiddle adds a paragraph on what it was building
        raise ConfigurationError(str(refused).split("\n")[0]) from None
    except Exception as reason:
        said = str(reason).split("\n")[0]
        raise ConfigurationError(f"{name} cannot be made: {said}") from None


@dataclass
class _Holder:
    """Stands in for a model that is not built, with the attributes that the checks ask for."""

    config: Any
    optim: Any
