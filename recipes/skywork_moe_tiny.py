"""`skywork_moe_tiny`: `skywork_tiny` upcycled to 16 experts and trained on with EDP."""

from dataclasses import replace
from typing import Optional

import lightning.pytorch as pl
import nemo_run as run
from nemo.collections.llm import finetune, pretrain

from nemo_skymoe.experiments.arguments import (
    BATCH,
    DEMONSTRATION,
    EXPERTS,
    Given,
    GivenFinetuning,
    with_arguments,
)
from nemo_skymoe.experiments.demonstration import MOE, finetuning_of
from nemo_skymoe.experiments.runs import Demonstration, Finetuning
from nemo_skymoe.experiments.scales import CORPUS
from nemo_skymoe.nemo.model import SkyworkMoETinyConfig
from nemo_skymoe.recipes import _parts
from nemo_skymoe.recipes._finetune import finetuning
from nemo_skymoe.recipes._pretrain import pretraining

NAME = MOE.name


@run.cli.factory(name=f"{NAME}_model")
def model(
    seq_length: int = MOE.seq_length, expert_capacity_factor: Optional[float] = MOE.expert_capacity_factor
) -> run.Config[pl.LightningModule]:
    """Return the model: 16 experts, top-2, an MoE in every layer, normalised gate, adaptive auxiliary loss, EDP."""
    return _parts.moe_model(SkyworkMoETinyConfig, expert_capacity_factor, seq_length=seq_length)


@run.cli.factory(target=pretrain, name=NAME)
@with_arguments(MOE, *DEMONSTRATION, *EXPERTS, corpus=CORPUS)
def pretrain_recipe(training: Demonstration, given: Given, devices: int = 2) -> run.Partial:
    """Pretrain with Expert Data Parallelism: the `edp` ranks of a tensor-parallel group share the experts.

    `resume_path` names the checkpoint to start from, as `skymoe demo` upcycles one; None starts from scratch.
    """
    made = model(training.seq_length, training.expert_capacity_factor)
    return pretraining(replace(training, num_gpus_per_node=devices), given, made)


@run.cli.factory(target=finetune, name=NAME)
@with_arguments(finetuning_of(MOE), "max_steps", *BATCH, of=GivenFinetuning)
def finetune_recipe(
    training: Finetuning, given: GivenFinetuning, corpus: str = CORPUS, devices: int = 1
) -> run.Partial:
    """Finetune on `corpus` by LoRA, or with `peft_scheme=none` every parameter; `resume_path` names the checkpoint."""
    training = replace(training, num_gpus_per_node=devices)
    return finetuning(training, given, model(training.seq_length), corpus=corpus)
