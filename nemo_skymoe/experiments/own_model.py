"""The training of a model of your own: everything about the model comes from its checkpoint, and the job's sizes are given.

The values are ours. They are starting points for one node, and every one of them is an argument.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from nemo_skymoe.architecture import SKYWORK_13B, SKYWORK_MOE_146B
from nemo_skymoe.checkpoint.description import Description
from nemo_skymoe.checkpoint.sources import open_source
from nemo_skymoe.checkpoint.torch_dist.deciding import CHANGES
from nemo_skymoe.checkpoint.torch_dist.model_options import model_options
from nemo_skymoe.checkpoint.torch_dist.names import layout
from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.experiments import choices
from nemo_skymoe.experiments.arguments import EXPERTS, RANKS, RATES, OfCheckpoint
from nemo_skymoe.experiments.planning import planner_options
from nemo_skymoe.experiments.runs import Finetuning, Pretraining, TrainingRun
from nemo_skymoe.pipeline.texts import planned

Run = TypeVar("Run", bound=TrainingRun)
Given = TypeVar("Given", bound=OfCheckpoint)

MOE = Pretraining(
    name="skywork_moe",
    architecture=SKYWORK_MOE_146B,  # until the checkpoint's takes its place
    seq_length=choices.SEQUENCE,
    tokens=10e9,
    global_batch_size=choices.BATCH,
    micro_batch_size=1,
    # As in the report's recipe: about where a dense model's own training has ended, and a tenth of it.
    max_lr=6e-5,
    min_lr=6e-6,
    warmup_steps=choices.UPCYCLED_WARMUP_STEPS,
)
DENSE = replace(MOE, name="skywork_dense", architecture=SKYWORK_13B)
MOE_FINETUNING = Finetuning(
    name="skywork_moe_finetune",
    architecture=SKYWORK_MOE_146B,
    max_steps=choices.FINETUNE_STEPS,
    seq_length=choices.FINETUNE_SEQUENCE,
    global_batch_size=choices.FINETUNE_BATCH,
    micro_batch_size=1,
)
DENSE_FINETUNING = replace(MOE_FINETUNING, name="skywork_dense_finetune", architecture=SKYWORK_13B)

_JOB = (*RANKS, "pipeline_parallelism", "global_batch_size", "micro_batch_size", "precision")
SIZES = ("edp", "tokens", *_JOB, *RATES)
"""The arguments of a dense pretraining. The ranks of `edp` are those of tensor parallelism."""
MOE_SIZES = (*EXPERTS, "tokens", *_JOB, *RATES)
FINETUNING_SIZES = ("edp", "max_steps", *_JOB)
MOE_FINETUNING_SIZES = ("edp", "expert_capacity_factor", "max_steps", *_JOB)
_PRECISIONS = ("bf16-mixed", "32")
_FORMS = {"nemo": "NeMo 2", "bridge": "Megatron-Bridge"}


@dataclass(frozen=True)
class StoredModel:
    """The part of a checkpoint that a recipe takes."""

    folder: str
    form: str
    """One of `checkpoint.formats.FORMATS`."""
    description: Description
    rows: int
    """Rows of embedding and head, padding included."""


_TO_COME: ContextVar[StoredModel | None] = ContextVar("to_come", default=None)


@contextmanager
def to_come(model: StoredModel) -> Iterator[None]:
    """Let recipes start from a checkpoint that a job before the training is going to write."""
    token = _TO_COME.set(model)
    try:
        yield
    finally:
        _TO_COME.reset(token)


def of_checkpoint(run: Run, given: Given, *, form: str, moe: bool) -> tuple[Run, Given]:
    """Return a training and its arguments with the model of the checkpoint in `given.resume_path`.

    Args:
        run: The sizes of the job.
        given: What a user gave beside them.
        form: The form in which the front door reads checkpoints: "nemo" or "bridge".
        moe: Whether the recipe is for an MoE, and not for a dense model.

    Raises:
        ConfigurationError: The folder is not here, holds another kind of model or form, or a size does not fit.
    """
    if given.scale is not None:
        raise ConfigurationError(f"scale is {given.scale!r}, expected none: the model is the checkpoint's")
    if run.precision not in _PRECISIONS:
        raise ConfigurationError(f"precision is {run.precision!r}, expected {' or '.join(_PRECISIONS)}")
    stored = _opened(given.resume_path, form)
    model, rows = stored.description, stored.rows
    if moe != (model.architecture.num_moe_experts is not None):
        kinds = ("an MoE", "skywork_dense") if moe else ("a dense model", "skywork_moe")
        raise ConfigurationError(
            f"resume_path '{stored.folder}' is {'dense' if moe else 'an MoE'}, expected {kinds[0]}: its recipe is"
            f" {kinds[1]}, and `skymoe upcycle` makes an MoE of a dense model"
        )
    options = model_options(model, rows)
    length = given.seq_length or min(run.seq_length, options.pop("seq_length"))
    options.pop("seq_length", None)
    if run.edp < 1 or rows % run.edp:
        raise ConfigurationError(
            f"edp is {run.edp}, expected a divisor of the {rows} rows of the embedding in '{stored.folder}'"
        )
    if given.rotary_base is not None:
        options |= {"rotary_base": given.rotary_base, CHANGES: ["rotary_base"]}
    changed = replace(run, architecture=model.architecture, model_options=options, seq_length=length)
    if isinstance(changed, Pretraining):
        changed = _as_long(changed, getattr(given, "max_steps", None))
    return _laid_out(changed, given), replace(given, resume_path=stored.folder)


def _as_long(run: Pretraining, max_steps: int | None) -> Pretraining:
    """Return the pretraining with `max_steps` steps, if they are given, and a checkpoint and a validation in any case."""
    per_step = run.seq_length * run.global_batch_size
    if max_steps is not None:
        if max_steps < 1:
            raise ConfigurationError(f"max_steps is {max_steps}, expected at least 1 step")
        run = replace(run, tokens=max_steps * per_step)
    if run.warmup_steps and run.warmup_steps >= run.max_steps:
        raise ConfigurationError(
            f"warmup_steps is {run.warmup_steps}, expected fewer than the {run.max_steps} steps of the training"
        )
    return replace(
        run,
        saved_tokens=min(run.save_interval, run.max_steps) * per_step,
        val_check_interval=min(run.val_check_interval, run.max_steps),
    )


def _opened(folder: str | None, form: str) -> StoredModel:
    if folder is None:
        raise ConfigurationError(
            "resume_path is missing, expected the folder of the checkpoint: resume_path=FOLDER"
        )
    model = _TO_COME.get()
    if model is not None and model.folder == folder:
        _check_form(model.form, form, folder)
        return model
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise ConfigurationError(
            f"resume_path '{folder}' is not a folder on this machine, expected to see it here: this recipe reads the"
            " model where it is made, and not where it trains"
        )
    source = open_source(path)
    _check_form(source.form, form, folder)
    rows = layout(source.weights.storage).padded_vocab_size
    return StoredModel(str(source.folder), source.form, source.description, rows)


def _check_form(found: str, expected: str, folder: str) -> None:
    if found != expected:
        raise ConfigurationError(
            f"resume_path '{folder}' has the form {found}, expected that of {_FORMS[expected]}: `skymoe convert --to"
            f" {expected}` and `skymoe upcycle --to {expected}` write it"
        )


def _laid_out(run: Run, given: OfCheckpoint) -> Run:
    """Return the training with the planner's pipeline, if it is asked for."""
    if given.plan is None:
        return run
    if given.plan != "auto":
        raise ConfigurationError(
            f"plan is {given.plan!r}, expected auto, or nothing for stages of equal length"
        )
    if run.pipeline_parallelism < 2:
        raise ConfigurationError(
            f"plan is auto and pipeline_parallelism {run.pipeline_parallelism}, expected 2 or more stages to plan for"
        )
    plan = planned(run.architecture, hardware=given.hardware, **planner_options(run, {}))
    laid_out: dict[str, Any] = {"pipeline_layout": plan.layout}
    if isinstance(run, Pretraining):
        laid_out["pipeline_recompute"] = tuple(map(tuple, plan.recompute))
    return replace(run, **laid_out)
