"""Figure 8: an MoE of 8 x 1.3B whose experts come from one dense model, or from four special ones (appendix C.2)."""

from dataclasses import replace

from nemo_skymoe.architecture import Architecture
from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.experiments import choices
from nemo_skymoe.experiments.figure_1 import DENSE as FIGURE_1_DENSE
from nemo_skymoe.experiments.runs import Pretraining

SKYWORK_1P3B = Architecture(
    num_layers=24,
    hidden_size=2048,
    ffn_hidden_size=5504,
    num_attention_heads=16,
    vocab_size=choices.VOCABULARY,
)
"""The dense model with 1.3B parameters. Its sizes are ours, at Skywork-13B's proportions (FFN 8/3 of the hidden size,
heads of 128)."""
SKYWORK_MOE_1P3B_X8 = SKYWORK_1P3B.with_experts(8)
"""The dense model with 8 experts in every layer (appendix C.2)."""

MICRO_BATCH = 2
"""This value is ours: 7B parameters and their gradients on two GPUs leave room for no more."""
SOURCES = (1, 4)
"""The sources of appendix C.2: one dense model, or three experts each of a Chinese and an English one, one of code and
one of the base."""

DENSE = Pretraining(
    name="skywork_1p3b",
    architecture=SKYWORK_1P3B,
    # Ours: the dense budget of Figure 1, at the customary rate for this size (GPT-3, 2005.14165, Table 2.1).
    tokens=FIGURE_1_DENSE.tokens,
    max_lr=2e-4,
    min_lr=2e-5,
    seq_length=choices.SEQUENCE,
    global_batch_size=choices.BATCH,
    micro_batch_size=MICRO_BATCH,
    num_nodes=choices.NODES,
)
SPECIALISED = replace(
    DENSE,
    name="skywork_1p3b_ffn",
    train_only_ffn=True,
    # Appendix C.2: 100B tokens of one domain, training the FFN part only.
    tokens=100e9,
    # Ours: constant, where the dense run ends, which a specialised source continues.
    max_lr=DENSE.min_lr,
    min_lr=DENSE.min_lr,
    warmup_steps=choices.UPCYCLED_WARMUP_STEPS,
)
MOE = Pretraining(
    name="skywork_moe_1p3b_x8",
    architecture=SKYWORK_MOE_1P3B_X8,
    # Appendix C.2, by the figure's caption; its curves end at 90B.
    tokens=100e9,
    # Ours: the dense run's rate again at the start, as section 3 advises where the MoE's budget is large.
    max_lr=DENSE.max_lr,
    min_lr=DENSE.min_lr,
    warmup_steps=choices.UPCYCLED_WARMUP_STEPS,
    seq_length=choices.SEQUENCE,
    global_batch_size=choices.BATCH,
    micro_batch_size=MICRO_BATCH,
    num_nodes=choices.NODES,
    edp=2,
)


def dense(
    run: Pretraining,
    resume_path: str | None,
    *,
    train_only_ffn: bool,
    tokens: float | None,
    max_lr: float | None,
    min_lr: float | None,
    warmup_steps: int | None,
) -> Pretraining:
    """Return `run` as the dense model or, with `train_only_ffn`, as a specialised source that continues it.

    Tokens and learning rates that are None follow `train_only_ffn`.

    Raises:
        ConfigurationError: A specialised source has no checkpoint to continue.
    """
    if train_only_ffn and resume_path is None:
        raise ConfigurationError(
            "resume_path is None with train_only_ffn, expected a checkpoint of skywork_1p3b"
        )
    usual = SPECIALISED if train_only_ffn else DENSE
    return replace(
        run,
        name=usual.name,
        train_only_ffn=train_only_ffn,
        tokens=tokens or usual.tokens,
        max_lr=max_lr or usual.max_lr,
        min_lr=usual.min_lr if min_lr is None else min_lr,
        warmup_steps=usual.warmup_steps if warmup_steps is None else warmup_steps,
    )


def from_sources(run: Pretraining, sources: int) -> Pretraining:
    """Return the MoE's `run` from one dense model or from four. The name says which.

    Raises:
        ConfigurationError: The number of sources is another.
    """
    if sources not in SOURCES:
        raise ConfigurationError(f"sources is {sources}, expected 1 or 4")
    return replace(run, name=f"{run.name}_{sources}_sources")
