"""`skywork_moe_1p8b`: Figure 7, the experts' learning rate (appendix C.1)."""

from typing import Optional

import lightning.pytorch as pl
import nemo_run as run
from lightning.pytorch.callbacks import LearningRateMonitor
from nemo.collections.llm import pretrain

from nemo_skymoe.experiments.arguments import BATCH, EXPERTS, RANKS, Given, with_arguments
from nemo_skymoe.experiments.figure_7 import MOE, at_rates
from nemo_skymoe.experiments.runs import Pretraining
from nemo_skymoe.nemo.model import SkyworkMoE1p8BConfig
from nemo_skymoe.recipes import _parts
from nemo_skymoe.recipes._pretrain import pretraining

NAME = MOE.name


@run.cli.factory(name=f"{NAME}_model")
def model(
    seq_length: int = MOE.seq_length, expert_capacity_factor: Optional[float] = MOE.expert_capacity_factor
) -> run.Config[pl.LightningModule]:
    """Return the model with 32 experts and top-2."""
    return _parts.moe_model(SkyworkMoE1p8BConfig, expert_capacity_factor, seq_length=seq_length)


@run.cli.factory(target=pretrain, name=NAME)
@with_arguments(MOE, *RANKS, "tokens", "decay_tokens", *BATCH, "warmup_steps", *EXPERTS)
def pretrain_recipe(
    training: Pretraining,
    given: Given,
    learning_rates: str = "baseline",
    max_lr: Optional[float] = None,
    expert_lr_multiplier: Optional[float] = None,
) -> run.Partial:
    """Pretrain from scratch at `learning_rates` baseline (6e-3), expert (experts at 1.5e-3) or all (1.5e-3).

    Linear to 10% in `tokens` tokens, then in `decay_tokens` to zero, in one run; `max_lr` and
    `expert_lr_multiplier` override the setting's.
    """
    training = at_rates(training, learning_rates, max_lr, expert_lr_multiplier)
    # NeMo logs the learning rate of one group of parameters.
    every_group = run.Config(LearningRateMonitor, logging_interval="step")
    made = model(training.seq_length, training.expert_capacity_factor)
    return pretraining(training, given, made, [every_group])
