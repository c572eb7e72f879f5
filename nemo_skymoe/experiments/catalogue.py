"""Every training that has a recipe, by name: what a user may say about it, and the run in plain values that this gives.

The recipes of Megatron-Bridge are made of it, and whoever launches one knows its sizes without Megatron-Bridge.
"""
# No `from __future__ import annotations`: the signatures are read when a user's values are checked.

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from nemo_skymoe.experiments import (
    demonstration,
    dense_13b,
    figure_1,
    figure_3,
    figure_7,
    figure_8,
    moe_146b,
    own_model,
)
from nemo_skymoe.experiments.arguments import (
    BATCH,
    DEMONSTRATION,
    EXPERTS,
    RANKS,
    RATES,
    Given,
    GivenTask,
    PretrainingOfCheckpoint,
    TaskOfCheckpoint,
    with_arguments,
)
from nemo_skymoe.experiments.runs import Demonstration, Finetuning, Pretraining
from nemo_skymoe.experiments.scales import CORPUS, at_scale
from nemo_skymoe.names import unknown


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """A training as a user has chosen it: at its scale, under its name, with what the user said beside its sizes."""

    run: Pretraining | Demonstration | Finetuning
    given: Given | GivenTask
    corpus: str | None = None
    """A folder that `skymoe corpus` or `skymoe preprocess` wrote; None is random tokens, or `dataset`."""
    dataset: str | None = None
    """Of a finetuning without a corpus: a folder with `training.jsonl` and `validation.jsonl`; None is SQuAD."""
    tokenizer: str | None = None
    """Folder of the tokenizer for `dataset`; None is the checkpoint's."""
    lora: bool = False
    """Whether a finetuning trains adapters on attention and MLPs, and nothing else."""


Experiment = Callable[..., Chosen]


def _pretraining(run: Pretraining | Demonstration, given: Given) -> Chosen:
    run = at_scale(replace(run, name=given.name or run.name), given.scale)
    return Chosen(run=run, given=given, corpus=given.corpus or (CORPUS if given.scale else None))


def _finetuning(
    run: Finetuning,
    given: GivenTask,
    *,
    lora: bool,
    dataset: str | None = None,
    corpus: str | None = None,
    tokenizer: str | None = None,
) -> Chosen:
    run = at_scale(replace(run, name=given.name or run.name), given.scale)
    if given.scale and dataset is None:
        corpus = corpus or CORPUS
    return Chosen(run=run, given=given, lora=lora, dataset=dataset, corpus=corpus, tokenizer=tokenizer)


@with_arguments(
    dense_13b.PRETRAINING, "pipeline_parallelism", *RANKS, "tokens", *BATCH, *RATES, "rotary_base"
)
def skywork_13b(training: Pretraining, given: Given) -> Chosen:
    """Pretrain Skywork-13B, the dense model that is upcycled, with DP 256 x PP 2 and ZeRO-1."""
    return _pretraining(training, given)


@with_arguments(
    moe_146b.PRETRAINING, *EXPERTS, "pipeline_parallelism", "pipeline_layout", *RANKS, "tokens", *BATCH, *RATES,
    "rotary_base",
)  # fmt: skip
def skywork_moe_146b(
    training: Pretraining,
    given: Given,
    pipeline_recompute: list[list[int]] | None = moe_146b.RECOMPUTE,
) -> Chosen:
    """Pretrain the 146B with PP 12 x EDP 4 x DP 32; `resume_path` names the upcycled checkpoint to start from.

    Layout and recomputed layers are the planner's (`skymoe plan`).
    """
    counts = None if pipeline_recompute is None else tuple(map(tuple, pipeline_recompute))
    return _pretraining(replace(training, pipeline_recompute=counts), given)


@with_arguments(figure_1.DENSE, *RANKS, "tokens", *BATCH, *RATES)
def skywork_300m(training: Pretraining, given: Given) -> Chosen:
    """Pretrain Figure 1's dense model that is upcycled, keeping a checkpoint every 10B tokens."""
    return _pretraining(training, given)


@with_arguments(figure_1.moe("scratch", "100b"), *RANKS, *BATCH, *EXPERTS)
def skywork_moe_300m_x8(
    training: Pretraining, given: Given, start: str = "scratch", budget: str = "100b"
) -> Chosen:
    """Pretrain Figure 1's MoE from `start` (scratch, 100b, 300b, 300b_high_lr) for `budget` (100b, 300b) tokens.

    But from scratch, `resume_path` names the dense checkpoint of that age, upcycled.
    """
    return _pretraining(figure_1.started(training, start, budget, given.resume_path), given)


@with_arguments(figure_3.MOE, *RANKS, "tokens", *BATCH, *RATES, *EXPERTS)
def skywork_moe_2p5b(training: Pretraining, given: Given, normalisation: str = "1") -> Chosen:
    """Pretrain Figure 3's MoE from scratch with `normalisation` off, 0.5, 1 or 2."""
    return _pretraining(figure_3.normalised(training, normalisation), given)


@with_arguments(figure_7.MOE, *RANKS, "tokens", "decay_tokens", *BATCH, "warmup_steps", *EXPERTS)
def skywork_moe_1p8b(
    training: Pretraining,
    given: Given,
    learning_rates: str = "baseline",
    max_lr: float | None = None,
    expert_lr_multiplier: float | None = None,
) -> Chosen:
    """Pretrain Figure 7's MoE at `learning_rates` baseline (6e-3), expert (experts at 1.5e-3) or all (1.5e-3).

    Linear to 10% in `tokens` tokens, then in `decay_tokens` to zero, in one run.
    """
    return _pretraining(figure_7.at_rates(training, learning_rates, max_lr, expert_lr_multiplier), given)


@with_arguments(figure_8.DENSE, *RANKS, *BATCH)
def skywork_1p3b(
    training: Pretraining,
    given: Given,
    train_only_ffn: bool = False,
    tokens: float | None = None,
    max_lr: float | None = None,
    min_lr: float | None = None,
    warmup_steps: int | None = None,
) -> Chosen:
    """Pretrain Figure 8's dense model; with `train_only_ffn` continue it from `resume_path` on one domain."""
    run = figure_8.dense(
        training,
        given.resume_path,
        train_only_ffn=train_only_ffn,
        tokens=tokens,
        max_lr=max_lr,
        min_lr=min_lr,
        warmup_steps=warmup_steps,
    )
    return _pretraining(run, given)


@with_arguments(figure_8.MOE, *RANKS, "tokens", *BATCH, *RATES, *EXPERTS)
def skywork_moe_1p3b_x8(training: Pretraining, given: Given, sources: int = 1) -> Chosen:
    """Pretrain Figure 8's MoE that `resume_path` was upcycled to from one dense model, or from four (`sources`)."""
    return _pretraining(figure_8.from_sources(training, sources), given)


@with_arguments(demonstration.DENSE, *DEMONSTRATION, corpus=CORPUS)
def skywork_tiny(training: Demonstration, given: Given, devices: int = 1) -> Chosen:
    """Pretrain the demonstration's dense model on `corpus` (`skymoe corpus DIRECTORY` makes one)."""
    return _pretraining(replace(training, num_gpus_per_node=devices), given)


@with_arguments(demonstration.MOE, *DEMONSTRATION, *EXPERTS, corpus=CORPUS)
def skywork_moe_tiny(training: Demonstration, given: Given, devices: int = 2) -> Chosen:
    """Pretrain the demonstration's MoE; `resume_path` names the upcycled checkpoint to start from."""
    return _pretraining(replace(training, num_gpus_per_node=devices), given)


@with_arguments(own_model.MOE, *own_model.MOE_SIZES, of=PretrainingOfCheckpoint)
def skywork_moe(training: Pretraining, given: PretrainingOfCheckpoint) -> Chosen:
    """Pretrain your own MoE: all of the model comes from the checkpoint in `resume_path`."""
    return _pretraining(*own_model.of_checkpoint(training, given, form="bridge", moe=True))


@with_arguments(own_model.DENSE, *own_model.SIZES, of=PretrainingOfCheckpoint)
def skywork_dense(training: Pretraining, given: PretrainingOfCheckpoint) -> Chosen:
    """Pretrain your own dense model: all of it comes from the checkpoint in `resume_path`."""
    return _pretraining(*own_model.of_checkpoint(training, given, form="bridge", moe=False))


def _own(run: Finetuning, lora: bool) -> Experiment:
    moe = run is own_model.MOE_FINETUNING
    sizes = own_model.MOE_FINETUNING_SIZES if moe else own_model.FINETUNING_SIZES

    @with_arguments(run, *sizes, of=TaskOfCheckpoint)
    def experiment(
        training: Finetuning,
        given: TaskOfCheckpoint,
        dataset: str | None = None,
        corpus: str | None = None,
        tokenizer: str | None = None,
    ) -> Chosen:
        """Finetune your own model, of which all comes from the checkpoint in `resume_path`.

        It trains on `dataset`, a folder with `training.jsonl` and `validation.jsonl`, on `corpus`, or on SQuAD.
        """
        changed, settled = own_model.of_checkpoint(training, given, form="bridge", moe=moe)
        return _finetuning(changed, settled, lora=lora, dataset=dataset, corpus=corpus, tokenizer=tokenizer)

    return experiment


def _large(run: Finetuning, lora: bool) -> Experiment:
    @with_arguments(
        run, "edp", "pipeline_parallelism", "pipeline_layout", *RANKS, "max_steps", *BATCH, of=GivenTask
    )
    def experiment(
        training: Finetuning, given: GivenTask, dataset: str | None = None, tokenizer: str | None = None
    ) -> Chosen:
        """Finetune on `dataset`, a folder with `training.jsonl` and `validation.jsonl`, or on SQuAD.

        `resume_path` names the checkpoint to finetune.
        """
        return _finetuning(training, given, lora=lora, dataset=dataset, tokenizer=tokenizer)

    return experiment


def _tiny(pretrained: Demonstration, lora: bool) -> Experiment:
    @with_arguments(demonstration.finetuning_of(pretrained), "max_steps", *BATCH, of=GivenTask)
    def experiment(training: Finetuning, given: GivenTask, corpus: str = CORPUS, devices: int = 1) -> Chosen:
        """Finetune on `corpus`. `resume_path` names the checkpoint to finetune."""
        return _finetuning(replace(training, num_gpus_per_node=devices), given, lora=lora, corpus=corpus)

    return experiment


_EXPERIMENTS: Mapping[tuple[str, str], Experiment] = {
    ("skywork_13b", "pretrain"): skywork_13b,
    ("skywork_moe_146b", "pretrain"): skywork_moe_146b,
    ("skywork_300m", "pretrain"): skywork_300m,
    ("skywork_moe_300m_x8", "pretrain"): skywork_moe_300m_x8,
    ("skywork_moe_2p5b", "pretrain"): skywork_moe_2p5b,
    ("skywork_moe_1p8b", "pretrain"): skywork_moe_1p8b,
    ("skywork_1p3b", "pretrain"): skywork_1p3b,
    ("skywork_moe_1p3b_x8", "pretrain"): skywork_moe_1p3b_x8,
    ("skywork_tiny", "pretrain"): skywork_tiny,
    ("skywork_moe_tiny", "pretrain"): skywork_moe_tiny,
    ("skywork_13b", "sft"): _large(dense_13b.FINETUNING, lora=False),
    ("skywork_13b", "peft"): _large(dense_13b.FINETUNING, lora=True),
    ("skywork_moe_146b", "sft"): _large(moe_146b.FINETUNING, lora=False),
    ("skywork_moe_146b", "peft"): _large(moe_146b.LORA, lora=True),
    ("skywork_tiny", "sft"): _tiny(demonstration.DENSE, lora=False),
    ("skywork_tiny", "peft"): _tiny(demonstration.DENSE, lora=True),
    ("skywork_moe_tiny", "sft"): _tiny(demonstration.MOE, lora=False),
    ("skywork_moe_tiny", "peft"): _tiny(demonstration.MOE, lora=True),
}
"""By model and task, as Megatron-Bridge calls the tasks."""

_OF_CHECKPOINTS: Mapping[tuple[str, str], Experiment] = {
    ("skywork_moe", "pretrain"): skywork_moe,
    ("skywork_moe", "sft"): _own(own_model.MOE_FINETUNING, lora=False),
    ("skywork_moe", "peft"): _own(own_model.MOE_FINETUNING, lora=True),
    ("skywork_dense", "pretrain"): skywork_dense,
    ("skywork_dense", "sft"): _own(own_model.DENSE_FINETUNING, lora=False),
    ("skywork_dense", "peft"): _own(own_model.DENSE_FINETUNING, lora=True),
}
"""The trainings of any model. Their names have no number of GPUs, because it is not known before the model is."""


def _full_name(model: str, task: str, experiment: Experiment) -> str:
    run = experiment().run
    ranks = run.num_nodes * run.num_gpus_per_node
    machine = f"{ranks}rank_cpu_fp32" if run.precision == "32" else f"{ranks}gpu_a800_bf16"
    return f"{model}_{task}_{machine}_config"


def _short_name(model: str, task: str) -> str:
    return f"{model}_{task}_config"


SHORT_NAMES = {_short_name(*key): _full_name(*key, experiment) for key, experiment in _EXPERIMENTS.items()}
"""The full name of each short one: `<model>_<task>_<N>gpu_<gpu>_<precision>_config`, as Megatron-Bridge names recipes."""
FIXED = {SHORT_NAMES[_short_name(*key)]: experiment for key, experiment in _EXPERIMENTS.items()}
"""The experiments of one model by the full names of their recipes."""
SHORT_NAMES |= {(name := _short_name(*key)): name for key in _OF_CHECKPOINTS}
RECIPES = FIXED | {_short_name(*key): experiment for key, experiment in _OF_CHECKPOINTS.items()}
"""All experiments by the full names of their recipes."""


def full_name(name: str, option: str = "--recipe") -> str:
    """Return the full name of a recipe.

    Raises:
        ConfigurationError: There is none. The message proposes the nearest one.
    """
    full = SHORT_NAMES.get(name, name)
    if full not in RECIPES:
        raise unknown(option, name, [*RECIPES, *SHORT_NAMES])
    return full


def task_of(name: str) -> str:
    """Return the task of a recipe: pretrain, sft or peft."""
    full = full_name(name)
    keys = (*_EXPERIMENTS, *_OF_CHECKPOINTS)
    return next(key[1] for key in keys if SHORT_NAMES[_short_name(*key)] == full)
