"""Values that the reports leave open and that several experiments share. All are ours, with their reasons."""

from collections.abc import Mapping
from typing import Any

from nemo_skymoe.config import ConfigurationError

VOCABULARY = 65536
"""The vocabulary of Table 2, for all models but Skywork-13B."""
SEQUENCE = 4096
"""Tokens of a sequence in the small experiments, as in Skywork-13B. Figure 1's dense model was trained before the MoE's
8192."""
BATCH = 1024
"""Sequences of a step in the small experiments. They are 4.2M tokens, so 300B tokens take 72,000 steps, which is usual
at this size."""
NODES, MICRO_BATCH = 4, 4
"""Nodes of 8 GPUs, and sequences that a GPU takes at once, in the small experiments. They change nothing about the
training but the tokens over which an expert's capacity is counted, which are those of a GPU."""
WARMUP_STEPS = 2000
"""The warm-up of every start from scratch: that of Skywork-13B's 7B trial (2310.19341)."""
UPCYCLED_WARMUP_STEPS = 100
"""The warm-up of an upcycled start: the optimizer's moments are new, the weights are not."""
WEIGHT_DECAY, ADAM_BETAS, ADAM_EPS, CLIP_GRAD = 0.1, (0.9, 0.95), 1e-8, 1.0
"""The values of Skywork-13B (2310.19341), because the MoE's report gives none."""
CAPACITY_FACTOR = 1.25
"""Capacity factor of the experts. The report's drop rates of 0.2 to 2% and its 38% MFU fit 1.1 to 1.25, and 1.25 is the
customary value."""

SAVE_INTERVAL, VALIDATION_INTERVAL, VALIDATION_BATCHES, LOG_INTERVAL = 1000, 1000, 32, 10
"""Steps between checkpoints, steps between validations, batches of a validation, and steps between lines of the log."""
SIMILARITY_INTERVAL = 500
"""Steps between two measurements of expert similarity, 2B tokens of the experiments. It costs a pass over the experts."""

LORA_DIM, LORA_ALPHA, LORA_LR = 8, 16, 1e-4
"""NeMo's own values for Llama 3."""
FINETUNE_LR = 5e-6
"""NeMo's own value for full finetuning of Llama 3 and Mixtral."""
FINETUNE_SEQUENCE, FINETUNE_BATCH, FINETUNE_STEPS = 2048, 128, 1000
"""NeMo's own values for SQuAD."""
FINETUNE_WARMUP_STEPS = 50
"""The longest warm-up of a finetuning; a shorter run warms up for a tenth of its steps."""


def one_of(option: str, value: str, table: Mapping[str, Any]) -> str:
    """Return `value`, which chooses an entry of `table`.

    Raises:
        ConfigurationError: There is no such entry. The message names the option.
    """
    if value not in table:
        raise ConfigurationError(f"{option} is {value!r}, expected one of {', '.join(table)}")
    return value


def adam(max_lr: float, min_lr: float) -> dict[str, Any]:
    """Return Megatron's options of Adam with decoupled weight decay and the distributed optimizer."""
    beta1, beta2 = ADAM_BETAS
    return {
        "optimizer": "adam",
        "lr": max_lr,
        "min_lr": min_lr,
        "weight_decay": WEIGHT_DECAY,
        "adam_beta1": beta1,
        "adam_beta2": beta2,
        "adam_eps": ADAM_EPS,
        "clip_grad": CLIP_GRAD,
        "use_distributed_optimizer": True,
    }
