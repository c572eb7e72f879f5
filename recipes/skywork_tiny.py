"""`skywork_tiny`: Skywork-13B's architecture at about 2M parameters, pretrained on the demonstration corpus."""

from dataclasses import replace

import lightning.pytorch as pl
import nemo_run as run
from nemo.collections.llm import finetune, pretrain

from nemo_skymoe.experiments.arguments import BATCH, DEMONSTRATION, Given, GivenFinetuning, with_arguments
from nemo_skymoe.experiments.demonstration import DENSE, finetuning_of
from nemo_skymoe.experiments.runs import Demonstration, Finetuning
from nemo_skymoe.experiments.scales import CORPUS
from nemo_skymoe.nemo.model import SkyworkTinyConfig
from nemo_skymoe.recipes import _parts
from nemo_skymoe.recipes._finetune import finetuning
from nemo_skymoe.recipes._pretrain import pretraining

NAME = DENSE.name


@run.cli.factory(name=f"{NAME}_model")
def model(seq_length: int = DENSE.seq_length) -> run.Config[pl.LightningModule]:
    """Return the dense model."""
    return _parts.dense_model(SkyworkTinyConfig, seq_length=seq_length)


@run.cli.factory(target=pretrain, name=NAME)
@with_arguments(DENSE, *DEMONSTRATION, corpus=CORPUS)
def pretrain_recipe(training: Demonstration, given: Given, devices: int = 1) -> run.Partial:
    """Pretrain on `corpus` (`skymoe corpus DIRECTORY` makes one), on one CPU rank unless `devices` says more."""
    return pretraining(replace(training, num_gpus_per_node=devices), given, model(training.seq_length))


@run.cli.factory(target=finetune, name=NAME)
@with_arguments(finetuning_of(DENSE), "max_steps", *BATCH, of=GivenFinetuning)
def finetune_recipe(
    training: Finetuning, given: GivenFinetuning, corpus: str = CORPUS, devices: int = 1
) -> run.Partial:
    """Finetune on `corpus` by LoRA, or with `peft_scheme=none` every parameter; `resume_path` names the checkpoint."""
    training = replace(training, num_gpus_per_node=devices)
    return finetuning(training, given, model(training.seq_length), corpus=corpus)
