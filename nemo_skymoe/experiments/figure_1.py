"""Figure 1: a dense 0.3B model, upcycled to 8 experts at two ages, against training from scratch (section 3)."""

from dataclasses import dataclass, replace

from nemo_skymoe.architecture import Architecture
from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.experiments import choices
from nemo_skymoe.experiments.runs import Pretraining

SKYWORK_300M = Architecture(
    num_layers=24,
    hidden_size=896,
    ffn_hidden_size=2304,
    num_attention_heads=14,
    vocab_size=choices.VOCABULARY,
)
"""The dense model with 0.3B parameters. Its sizes are ours, at Skywork-13B's proportions (FFN 8/3 of the hidden size,
heads of 64)."""
SKYWORK_MOE_300M_X8 = SKYWORK_300M.with_experts(8)
"""The dense model with 8 experts in every layer (section 3)."""

DENSE = Pretraining(
    name="skywork_300m",
    architecture=SKYWORK_300M,
    # Section 3: a cosine over 300B tokens. Checkpoints at 100B and 300B tokens are upcycled.
    tokens=300e9,
    max_lr=3e-3,
    min_lr=3e-4,
    seq_length=choices.SEQUENCE,
    global_batch_size=choices.BATCH,
    micro_batch_size=choices.MICRO_BATCH,
    num_nodes=choices.NODES,
    # Ours: every checkpoint is kept, for two of them are upcycled.
    saved_tokens=10e9,
    kept_checkpoints=-1,
)


@dataclass(frozen=True)
class Start:
    """A start of Figure 1's MoE, with its learning rate. All of them end at the dense model's last one."""

    max_lr: float
    lr_shape: str
    checkpoint: str
    """The checkpoint in words, empty from scratch."""

    @property
    def warmup_steps(self) -> int:
        """Optimizer steps from near zero to `max_lr`. The report gives none."""
        return choices.UPCYCLED_WARMUP_STEPS if self.checkpoint else choices.WARMUP_STEPS


STARTS = {
    "scratch": Start(3e-3, "cosine", ""),
    "100b": Start(1.8e-3, "cosine", "skywork_300m after 100B tokens"),
    "300b": Start(3e-4, "constant", "skywork_300m after 300B tokens"),
    "300b_high_lr": Start(1.2e-3, "cosine", "skywork_300m after 300B tokens"),
}
"""The starts of section 3. The legend calls the last one 3xLR; 1.2e-3 is four times 3e-4."""
BUDGETS = {"100b": 100e9, "300b": 300e9}
"""Tokens of the MoE's training (section 3), which cost 2/3 and 2 times what the dense model cost."""


def moe(start: str, budget: str) -> Pretraining:
    """Return the MoE that begins at `start` of STARTS and sees the `budget` of BUDGETS."""
    chosen = STARTS[start]
    return replace(
        DENSE,
        name=f"skywork_moe_300m_x8_{start}_{budget}",
        architecture=SKYWORK_MOE_300M_X8,
        tokens=BUDGETS[budget],
        max_lr=chosen.max_lr,
        lr_shape=chosen.lr_shape,
        warmup_steps=chosen.warmup_steps,
        saved_tokens=None,
        kept_checkpoints=1,
    )


def started(run: Pretraining, start: str, budget: str, resume_path: str | None) -> Pretraining:
    """Return `run` with the tokens and learning rates of a start and a budget.

    Raises:
        ConfigurationError: There is no such start or budget, or the start needs a checkpoint and has none, or the other
            way round.
    """
    chosen = STARTS[choices.one_of("start", start, STARTS)]
    if (resume_path is None) != (chosen.checkpoint == ""):
        expected = f"{chosen.checkpoint}, upcycled" if chosen.checkpoint else "none"
        raise ConfigurationError(f"resume_path is {resume_path} with start={start}, expected {expected}")
    usual = moe(start, choices.one_of("budget", budget, BUDGETS))
    return replace(
        run,
        name=usual.name,
        tokens=usual.tokens,
        max_lr=usual.max_lr,
        lr_shape=usual.lr_shape,
        warmup_steps=usual.warmup_steps,
    )
