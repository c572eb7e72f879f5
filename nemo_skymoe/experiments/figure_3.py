"""Figure 3: an MoE of 2.5B parameters without normalisation of the gate's logits, and at three scales (section 4.1)."""

from dataclasses import replace

from nemo_skymoe.experiments import choices
from nemo_skymoe.experiments.figure_1 import DENSE, SKYWORK_300M
from nemo_skymoe.experiments.runs import Pretraining

SKYWORK_MOE_2P5B = SKYWORK_300M.with_experts(16)
"""The MoE with 2.5B parameters and 16 experts (section 4.1). Our choice is Figure 1's dense model, which gives that
number."""

LOGIT_NORM_SCALES = {"off": None, "0.5": 0.5, "1": 1.0, "2": 2.0}
"""Values of lambda in eq. (6) (section 4.1)."""

MOE = Pretraining(
    name="skywork_moe_2p5b",
    architecture=SKYWORK_MOE_2P5B,
    # Figure 3's last point.
    tokens=75e9,
    # Ours: those of Figure 1's models, which share its width and depth.
    max_lr=DENSE.max_lr,
    min_lr=DENSE.min_lr,
    seq_length=choices.SEQUENCE,
    global_batch_size=choices.BATCH,
    micro_batch_size=choices.MICRO_BATCH,
    num_nodes=choices.NODES,
)


def normalised(run: Pretraining, normalisation: str) -> Pretraining:
    """Return `run` with a value of lambda: off, 0.5, 1 or 2. The name says which.

    Raises:
        ConfigurationError: The value is another.
    """
    scale = LOGIT_NORM_SCALES[choices.one_of("normalisation", normalisation, LOGIT_NORM_SCALES)]
    return replace(run, name=f"{run.name}_norm_{normalisation}", logit_norm_scale=scale)
