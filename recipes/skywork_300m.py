"""`skywork_300m` and `skywork_moe_300m_x8`: Figure 1, upcycling against training from scratch (section 3)."""

from typing import Optional

import lightning.pytorch as pl
import nemo_run as run
from nemo.collections.llm import pretrain

from nemo_skymoe.experiments import figure_1
from nemo_skymoe.experiments.arguments import BATCH, EXPERTS, RANKS, RATES, Given, with_arguments
from nemo_skymoe.experiments.figure_1 import DENSE
from nemo_skymoe.experiments.runs import Pretraining
from nemo_skymoe.nemo.model import Skywork300MConfig, SkyworkMoE300MX8Config
from nemo_skymoe.recipes import _parts
from nemo_skymoe.recipes._pretrain import pretraining

NAME = DENSE.name
MOE = "skywork_moe_300m_x8"
FROM_SCRATCH = figure_1.moe("scratch", "100b")


@run.cli.factory(name=f"{NAME}_model")
def model(seq_length: int = DENSE.seq_length) -> run.Config[pl.LightningModule]:
    """Return the dense model."""
    return _parts.dense_model(Skywork300MConfig, seq_length=seq_length)


@run.cli.factory(name=f"{MOE}_model")
def moe_model(
    seq_length: int = FROM_SCRATCH.seq_length,
    expert_capacity_factor: Optional[float] = FROM_SCRATCH.expert_capacity_factor,
) -> run.Config[pl.LightningModule]:
    """Return the model with 8 experts in every layer."""
    return _parts.moe_model(SkyworkMoE300MX8Config, expert_capacity_factor, seq_length=seq_length)


@run.cli.factory(target=pretrain, name=NAME)
@with_arguments(DENSE, *RANKS, "tokens", *BATCH, *RATES)
def pretrain_recipe(training: Pretraining, given: Given) -> run.Partial:
    """Pretrain the dense model that is upcycled, keeping a checkpoint every 10B tokens."""
    return pretraining(training, given, model(training.seq_length))


@run.cli.factory(target=pretrain, name=MOE)
@with_arguments(FROM_SCRATCH, *RANKS, *BATCH, *EXPERTS)
def moe_pretrain_recipe(
    training: Pretraining, given: Given, start: str = "scratch", budget: str = "100b"
) -> run.Partial:
    """Pretrain the MoE from `start` (scratch, 100b, 300b, 300b_high_lr) for `budget` (100b, 300b) tokens.

    The name says both. But from scratch, `resume_path` names the dense checkpoint of that age, upcycled.
    """
    training = figure_1.started(training, start, budget, given.resume_path)
    return pretraining(training, given, moe_model(training.seq_length, training.expert_capacity_factor))
