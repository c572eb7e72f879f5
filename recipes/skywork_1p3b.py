"""`skywork_1p3b` and `skywork_moe_1p3b_x8`: Figure 8, experts from one or from four dense models (appendix C.2)."""

from typing import Optional

import lightning.pytorch as pl
import nemo_run as run
from nemo.collections.llm import pretrain

from nemo_skymoe.experiments import figure_8
from nemo_skymoe.experiments.arguments import BATCH, EXPERTS, RANKS, RATES, Given, with_arguments
from nemo_skymoe.experiments.figure_8 import DENSE
from nemo_skymoe.experiments.runs import Pretraining
from nemo_skymoe.nemo.model import Skywork1p3BConfig, SkyworkMoE1p3BX8Config
from nemo_skymoe.recipes import _parts
from nemo_skymoe.recipes._pretrain import pretraining

NAME = DENSE.name
MOE = figure_8.MOE.name


@run.cli.factory(name=f"{NAME}_model")
def model(seq_length: int = DENSE.seq_length, train_only_ffn: bool = False) -> run.Config[pl.LightningModule]:
    """Return the dense model. With `train_only_ffn` only the weights of its MLPs are trained."""
    return _parts.dense_model(Skywork1p3BConfig, seq_length=seq_length, train_only_ffn=train_only_ffn)


@run.cli.factory(name=f"{MOE}_model")
def moe_model(
    seq_length: int = figure_8.MOE.seq_length,
    expert_capacity_factor: Optional[float] = figure_8.MOE.expert_capacity_factor,
) -> run.Config[pl.LightningModule]:
    """Return the model with 8 experts in every layer."""
    return _parts.moe_model(SkyworkMoE1p3BX8Config, expert_capacity_factor, seq_length=seq_length)


@run.cli.factory(target=pretrain, name=NAME)
@with_arguments(DENSE, *RANKS, *BATCH)
def pretrain_recipe(
    training: Pretraining,
    given: Given,
    train_only_ffn: bool = False,
    tokens: Optional[float] = None,
    max_lr: Optional[float] = None,
    min_lr: Optional[float] = None,
    warmup_steps: Optional[int] = None,
) -> run.Partial:
    """Pretrain the dense model; with `train_only_ffn` continue it from `resume_path` on one domain, its FFNs alone.

    The domain is the corpus. Unless they are given, tokens and learning rates follow `train_only_ffn`.
    """
    training = figure_8.dense(
        training,
        given.resume_path,
        train_only_ffn=train_only_ffn,
        tokens=tokens,
        max_lr=max_lr,
        min_lr=min_lr,
        warmup_steps=warmup_steps,
    )
    return pretraining(training, given, model(training.seq_length, train_only_ffn))


@run.cli.factory(target=pretrain, name=MOE)
@with_arguments(figure_8.MOE, *RANKS, "tokens", *BATCH, *RATES, *EXPERTS)
def moe_pretrain_recipe(training: Pretraining, given: Given, sources: int = 1) -> run.Partial:
    """Pretrain the MoE that `resume_path` was upcycled to from one dense model, or from four.

    Four: three experts each of a Chinese and an English model, one of code and one of the base (`skymoe upcycle`
    takes them); `sources` names the run.
    """
    made = moe_model(training.seq_length, training.expert_capacity_factor)
    return pretraining(figure_8.from_sources(training, sources), given, made)
