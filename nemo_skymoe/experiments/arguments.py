"""The signature of a recipe: arguments that all recipes take, arguments of its own, and sizes of its training."""
# No `from __future__ import annotations`, and `Optional`: NeMo-Run reads these signatures, and cannot parse `X | None`.

import functools
import inspect
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import Field, dataclass, fields, replace
from typing import Any, Optional, Union, get_args, get_type_hints

from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.experiments.runs import TrainingRun

RANKS = ("num_nodes", "num_gpus_per_node")
BATCH = ("seq_length", "global_batch_size", "micro_batch_size")
RATES = ("max_lr", "min_lr", "warmup_steps")
EXPERTS = ("edp", "expert_capacity_factor", "similarity_interval")
DEMONSTRATION = ("max_steps", *BATCH, *RATES, "val_check_interval", "limit_val_batches", "data_seed")
"""Sizes of a training that several recipes have as arguments."""
RENAMED = {"stages": "phases"}
"""Arguments that are refused with their new names."""


@dataclass(frozen=True, kw_only=True)
class Given:
    """The arguments that every pretraining recipe takes."""

    dir: Optional[str] = "runs"
    name: Optional[str] = None
    corpus: Optional[str] = None
    resume_path: Optional[str] = None
    scale: Optional[str] = None
    mixture: Optional[str] = None
    phases: Optional[str] = None


@dataclass(frozen=True, kw_only=True)
class GivenTask:
    """The arguments that every recipe takes that finetunes in one way."""

    dir: Optional[str] = "runs"
    name: Optional[str] = None
    resume_path: Optional[str] = None
    scale: Optional[str] = None
    max_lr: Optional[float] = None


@dataclass(frozen=True, kw_only=True)
class GivenFinetuning(GivenTask):
    """The arguments that every recipe takes that finetunes every parameter or adapters."""

    peft_scheme: Optional[str] = "lora"


@dataclass(frozen=True, kw_only=True)
class OfCheckpoint:
    """The arguments that every recipe takes whose model is read from the checkpoint in `resume_path`."""

    resume_path: Optional[str] = None
    scale: Optional[str] = None
    seq_length: Optional[int] = None
    """None is the usual length, or the model's own if that is shorter."""
    rotary_base: Optional[float] = None
    """Another base than the checkpoint's, for a longer context. None keeps the checkpoint's."""
    plan: Optional[str] = None
    """"auto" asks the planner which layers are on which pipeline stage; None spreads them evenly."""
    hardware: str = "A800-80G"
    """The hardware that is planned for, as in `skymoe plan`."""


@dataclass(frozen=True, kw_only=True)
class PretrainingOfCheckpoint(OfCheckpoint, Given):
    """The same of a pretraining."""

    max_steps: Optional[int] = None
    """Optimizer steps, in place of `tokens`."""


@dataclass(frozen=True, kw_only=True)
class TaskOfCheckpoint(OfCheckpoint, GivenTask):
    """The same of a finetuning in one way."""


@dataclass(frozen=True, kw_only=True)
class FinetuningOfCheckpoint(OfCheckpoint, GivenFinetuning):
    """The same of a finetuning of every parameter or of adapters."""


def with_arguments(
    training: TrainingRun, *sizes: str, of: type[Any] = Given, **defaults: Any
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a recipe of `function(training, given, own arguments)`: a function of keywords with a real signature.

    NeMo-Run reads names, annotations and defaults from it. What `function` gets is `training` with the sizes that were
    given, and the rest of the shared arguments as an `of`.

    Args:
        training: The recipe's values, which are the defaults of `sizes`.
        sizes: Fields of `training` that are arguments of the recipe.
        of: `Given` or `GivenFinetuning`, whose fields are arguments of the recipe.
        defaults: Other defaults for the fields of `of`, which must then have a value of that type.

    Raises:
        ConfigurationError: From the recipe, for an argument that has another name now.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        shared = [field.name for field in fields(of)]
        returned = inspect.signature(function).return_annotation
        _, _, *own = inspect.signature(function).parameters.values()
        parameters = [
            *(_shared(field, defaults) for field in fields(of)),
            *(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own),
            *(_size(training, name) for name in sizes),
        ]
        signature = inspect.Signature(parameters, return_annotation=returned)

        @functools.wraps(function)
        def recipe(**arguments: Any) -> Any:
            check_renamed(arguments)
            bound = signature.bind(**arguments)
            bound.apply_defaults()
            given = of(**{name: bound.arguments.pop(name) for name in shared})
            changed = replace(training, **{name: bound.arguments.pop(name) for name in sizes})
            return function(changed, given, **bound.arguments)

        recipe.__signature__ = signature  # type: ignore[attr-defined]
        recipe.__annotations__ = {each.name: each.annotation for each in parameters} | {"return": returned}
        return recipe

    return decorate


def check_renamed(names: Iterable[str], section: str = "") -> None:
    """Refuse an argument that has another name now. `section` stands before names, such as "training.".

    Raises:
        ConfigurationError: The argument was renamed. The message has the new name.
    """
    for old in RENAMED.keys() & set(names):
        new = RENAMED[old]
        raise ConfigurationError(f"{section}{old} is now called {new}, expected {section}{new}=VALUE")


def _shared(field: "Field[Any]", defaults: Mapping[str, Any]) -> inspect.Parameter:
    if field.name in defaults:
        return _parameter(field.name, defaults[field.name], type(defaults[field.name]))
    return _parameter(field.name, field.default, field.type)


def _size(training: TrainingRun, name: str) -> inspect.Parameter:
    hint = get_type_hints(type(training))[name]
    if isinstance(hint, types.UnionType):
        hint = Union[get_args(hint)]  # NeMo-Run cannot parse `X | None`
    return _parameter(name, getattr(training, name), hint)


def _parameter(name: str, default: Any, hint: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint)
