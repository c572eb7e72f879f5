"""`skywork_moe`: your own MoE. All of the model comes from the checkpoint in `resume_path`; the job's sizes are arguments."""

from typing import Optional

import nemo_run as run
from nemo.collections.llm import finetune, pretrain

from nemo_skymoe.experiments.arguments import (
    FinetuningOfCheckpoint,
    PretrainingOfCheckpoint,
    with_arguments,
)
from nemo_skymoe.experiments.own_model import (
    MOE,
    MOE_FINETUNING,
    MOE_FINETUNING_SIZES,
    MOE_SIZES,
    of_checkpoint,
)
from nemo_skymoe.experiments.runs import Finetuning, Pretraining
from nemo_skymoe.nemo.model import SkyworkMoEConfig
from nemo_skymoe.recipes import _parts
from nemo_skymoe.recipes._finetune import finetuning
from nemo_skymoe.recipes._pretrain import pretraining

NAME = MOE.name


@run.cli.factory(target=pretrain, name=NAME)
@with_arguments(MOE, *MOE_SIZES, of=PretrainingOfCheckpoint)
def pretrain_recipe(training: Pretraining, given: PretrainingOfCheckpoint) -> run.Partial:
    """Pretrain the MoE that `skymoe upcycle` wrote, or one that was trained before, with Expert Data Parallelism."""
    training, given = of_checkpoint(training, given, form="nemo", moe=True)
    return pretraining(training, given, _model(training))


@run.cli.factory(target=finetune, name=NAME)
@with_arguments(MOE_FINETUNING, *MOE_FINETUNING_SIZES, of=FinetuningOfCheckpoint)
def finetune_recipe(
    training: Finetuning,
    given: FinetuningOfCheckpoint,
    dataset: Optional[str] = None,
    corpus: Optional[str] = None,
) -> run.Partial:
    """Finetune by LoRA, or with `peft_scheme=none` every parameter, on `dataset`, `corpus` or SQuAD."""
    training, given = of_checkpoint(training, given, form="nemo", moe=True)
    return finetuning(training, given, _model(training), dataset=dataset, corpus=corpus)


def _model(training: Pretraining | Finetuning) -> run.Config:
    return _parts.moe_model(
        SkyworkMoEConfig,
        training.expert_capacity_factor,
        seq_length=training.seq_length,
        **training.model_options,
    )
