"""`skywork_13b`: Skywork-13B (arXiv 2310.19341), the dense model that the report upcycles."""

from dataclasses import replace
from typing import Optional

import lightning.pytorch as pl
import nemo_run as run
from nemo.collections.llm import finetune, pretrain

from nemo_skymoe.experiments.arguments import BATCH, RANKS, RATES, Given, GivenFinetuning, with_arguments
from nemo_skymoe.experiments.dense_13b import FINETUNING, PRETRAINING
from nemo_skymoe.experiments.runs import Finetuning, Pretraining
from nemo_skymoe.nemo.model import Skywork13BConfig
from nemo_skymoe.recipes import _parts
from nemo_skymoe.recipes._finetune import finetuning
from nemo_skymoe.recipes._pretrain import pretraining

NAME = PRETRAINING.name
CHECKPOINT = "nemo://Skywork/Skywork-13B-base"


@run.cli.factory(name=f"{NAME}_model")
def model(
    seq_length: int = PRETRAINING.seq_length, rotary_base: int = PRETRAINING.rotary_base
) -> run.Config[pl.LightningModule]:
    """Return the model with 13.85B parameters at its vocabulary of 65,519."""
    return _parts.dense_model(Skywork13BConfig, seq_length=seq_length, rotary_base=rotary_base)


@run.cli.factory(target=pretrain, name=NAME)
@with_arguments(PRETRAINING, "pipeline_parallelism", *RANKS, "tokens", *BATCH, *RATES, "rotary_base")
def pretrain_recipe(
    training: Pretraining,
    given: Given,
    transformer_engine: Optional[bool] = None,
    rope_fusion: Optional[bool] = None,
    gradient_accumulation_fusion: Optional[bool] = None,
    communication_overlap: bool = True,
) -> run.Partial:
    """Pretrain with DP 256 x PP 2 and ZeRO-1 on 512 GPUs; a fusion that is None is on where the machine has it."""
    made = _parts.with_fusions(
        model(training.seq_length, training.rotary_base),
        transformer_engine,
        apply_rope_fusion=rope_fusion,
        gradient_accumulation_fusion=gradient_accumulation_fusion,
    )
    return pretraining(training, given, made, communication_overlap=communication_overlap)


@run.cli.factory(target=finetune, name=NAME)
@with_arguments(FINETUNING, "pipeline_parallelism", *RANKS, "max_steps", *BATCH, of=GivenFinetuning)
def finetune_recipe(
    training: Finetuning, given: GivenFinetuning, dataset: Optional[str] = None
) -> run.Partial:
    """Finetune by LoRA, or with `peft_scheme=none` every parameter.

    `dataset` is a folder with NeMo's `training.jsonl` and `validation.jsonl`, None SQuAD; `resume_path` defaults to
    what `nemo llm import` makes of Skywork/Skywork-13B-base (at the toy scale, to new weights).
    """
    given = replace(given, resume_path=given.resume_path or (None if given.scale else CHECKPOINT))
    return finetuning(training, given, model(training.seq_length), dataset=dataset)
