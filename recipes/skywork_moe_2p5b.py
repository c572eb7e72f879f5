"""`skywork_moe_2p5b`: Figure 3, gating-logit normalisation off and at three scales (section 4.1)."""

from typing import Optional

import lightning.pytorch as pl
import nemo_run as run
from nemo.collections.llm import pretrain

from nemo_skymoe.experiments.arguments import BATCH, EXPERTS, RANKS, RATES, Given, with_arguments
from nemo_skymoe.experiments.choices import one_of
from nemo_skymoe.experiments.figure_3 import LOGIT_NORM_SCALES, MOE, normalised
from nemo_skymoe.experiments.runs import Pretraining
from nemo_skymoe.nemo.model import SkyworkMoE2p5BConfig
from nemo_skymoe.recipes import _parts
from nemo_skymoe.recipes._pretrain import pretraining

NAME = MOE.name


@run.cli.factory(name=f"{NAME}_model")
def model(
    normalisation: str = "1",
    seq_length: int = MOE.seq_length,
    expert_capacity_factor: Optional[float] = MOE.expert_capacity_factor,
) -> run.Config[pl.LightningModule]:
    """Return the model with 16 experts. `normalisation` is lambda of eq. (6): off, 0.5, 1 or 2."""
    scale = LOGIT_NORM_SCALES[one_of("normalisation", normalisation, LOGIT_NORM_SCALES)]
    return _parts.moe_model(
        SkyworkMoE2p5BConfig, expert_capacity_factor, seq_length=seq_length, moe_router_logit_norm_scale=scale
    )


@run.cli.factory(target=pretrain, name=NAME)
@with_arguments(MOE, *RANKS, "tokens", *BATCH, *RATES, *EXPERTS)
def pretrain_recipe(training: Pretraining, given: Given, normalisation: str = "1") -> run.Partial:
    """Pretrain from scratch with `normalisation` off, 0.5, 1 or 2; the name says which."""
    made = model(normalisation, training.seq_length, training.expert_capacity_factor)
    return pretraining(normalised(training, normalisation), given, made)
