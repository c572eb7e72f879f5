"""`skywork_dense`: your own dense model. All of it comes from the checkpoint in `resume_path`; the job's sizes are arguments."""

from typing import Optional

import nemo_run as run
from nemo.collections.llm import finetune, pretrain

from nemo_skymoe.experiments.arguments import (
    FinetuningOfCheckpoint,
    PretrainingOfCheckpoint,
    with_arguments,
)
from nemo_skymoe.experiments.own_model import DENSE, DENSE_FINETUNING, FINETUNING_SIZES, SIZES, of_checkpoint
from nemo_skymoe.experiments.runs import Finetuning, Pretraining
from nemo_skymoe.nemo.model import SkyworkConfig
from nemo_skymoe.recipes import _parts
from nemo_skymoe.recipes._finetune import finetuning
from nemo_skymoe.recipes._pretrain import pretraining

NAME = DENSE.name


@run.cli.factory(target=pretrain, name=NAME)
@with_arguments(DENSE, *SIZES, of=PretrainingOfCheckpoint)
def pretrain_recipe(training: Pretraining, given: PretrainingOfCheckpoint) -> run.Partial:
    """Continue the training of a dense model, converted by `skymoe convert`; `edp` is its tensor-parallel size."""
    training, given = of_checkpoint(training, given, form="nemo", moe=False)
    return pretraining(training, given, _model(training))


@run.cli.factory(target=finetune, name=NAME)
@with_arguments(DENSE_FINETUNING, *FINETUNING_SIZES, of=FinetuningOfCheckpoint)
def finetune_recipe(
    training: Finetuning,
    given: FinetuningOfCheckpoint,
    dataset: Optional[str] = None,
    corpus: Optional[str] = None,
) -> run.Partial:
    """Finetune by LoRA, or with `peft_scheme=none` every parameter, on `dataset`, `corpus` or SQuAD."""
    training, given = of_checkpoint(training, given, form="nemo", moe=False)
    return finetuning(training, given, _model(training), dataset=dataset, corpus=corpus)


def _model(training: Pretraining | Finetuning) -> run.Config:
    return _parts.dense_model(SkyworkConfig, seq_length=training.seq_length, **training.model_options)
