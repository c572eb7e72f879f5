"""Figure 7: an MoE of 1.8B parameters at three pairs of learning rates, for experts and the rest (appendix C.1)."""

from dataclasses import dataclass, replace

from nemo_skymoe.architecture import Architecture
from nemo_skymoe.experiments import choices
from nemo_skymoe.experiments.runs import Pretraining

SKYWORK_MOE_1P8B = Architecture(
    num_layers=12,
    hidden_size=768,
    ffn_hidden_size=2048,
    num_attention_heads=12,
    vocab_size=choices.VOCABULARY,
    num_moe_experts=32,
    moe_router_topk=2,
)
"""The MoE with 1.8B parameters, 32 experts and top-2 (appendix C.1). Its sizes are ours, at Skywork-13B's proportions.
"""


@dataclass(frozen=True)
class Rates:
    """The peak learning rate, and its multiplier for the experts' parameters."""

    max_lr: float
    expert_lr_multiplier: float


LEARNING_RATES = {
    "baseline": Rates(6e-3, 1.0),
    "expert": Rates(6e-3, 0.25),
    "all": Rates(1.5e-3, 1.0),
}
"""The settings of appendix C.1: 6e-3; 1.5e-3 for the experts, sqrt(topk / experts) = 1/4 of it; 1.5e-3 for all."""
FINAL_FRACTION = 0.1
"""The learning rate falls linearly to 10% of the peak (appendix C.1)."""

MOE = Pretraining(
    name="skywork_moe_1p8b",
    architecture=SKYWORK_MOE_1P8B,
    # Appendix C.1: 300B tokens to 10% of the peak, then 10B to zero.
    tokens=300e9,
    decay_tokens=10e9,
    lr_shape="linear",
    max_lr=LEARNING_RATES["baseline"].max_lr,
    min_lr=FINAL_FRACTION * LEARNING_RATES["baseline"].max_lr,
    seq_length=choices.SEQUENCE,
    global_batch_size=choices.BATCH,
    micro_batch_size=choices.MICRO_BATCH,
    num_nodes=choices.NODES,
)


def at_rates(
    run: Pretraining, learning_rates: str, max_lr: float | None, expert_lr_multiplier: float | None
) -> Pretraining:
    """Return `run` at learning rates that end at the same share of their peak. The name says which.

    Args:
        run: The training.
        learning_rates: A setting of LEARNING_RATES.
        max_lr: Another peak than the setting's.
        expert_lr_multiplier: Another multiplier than the setting's.

    Raises:
        ConfigurationError: There is no such setting.
    """
    usual = LEARNING_RATES[choices.one_of("learning_rates", learning_rates, LEARNING_RATES)]
    peak = max_lr or usual.max_lr
    return replace(
        run,
        name=f"{run.name}_{learning_rates}",
        max_lr=peak,
        min_lr=FINAL_FRACTION * peak,
        expert_lr_multiplier=usual.expert_lr_multiplier
        if expert_lr_multiplier is None
        else expert_lr_multiplier,
    )
