"""A training run in plain values: a model, its tokens, its learning rates and the ranks that it runs on."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nemo_skymoe.architecture import Architecture
from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.experiments import choices


@dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """Model, batch and ranks, which pretraining and finetuning have in common."""

    name: str
    architecture: Architecture
    model_options: Mapping[str, Any] = field(default_factory=dict)
    """Options of the model by Megatron's names, in place of those below: all that a checkpoint says of its model."""
    rotary_base: int = 10_000
    expert_capacity_factor: float | None = choices.CAPACITY_FACTOR
    """An expert of an MoE takes this multiple of its fair share of tokens. None drops nothing."""
    logit_norm_scale: float | None = 1.0
    """Lambda of eq. (6), to which an MoE's gate normalises its logits. None does not normalise them."""
    train_only_ffn: bool = False
    """Whether to train nothing but the weights of the MLPs (appendix C.2)."""

    seq_length: int
    """Tokens of a sequence."""
    global_batch_size: int
    """Sequences of an optimizer step."""
    micro_batch_size: int
    """Sequences of a forward pass of one data-parallel rank."""

    num_nodes: int = 1
    num_gpus_per_node: int = 8
    edp: int = 1
    """Number of ranks that share the attention (tensor-parallel) and the experts (appendix B.1). 1 splits neither."""
    pipeline_parallelism: int = 1
    pipeline_layout: str | None = None
    """Megatron's layout, which says which layers are on which pipeline stage. None spreads them evenly."""
    precision: str = "bf16-mixed"
    """Precision as Lightning names it. "32" is for CPUs, on one machine."""

    val_check_interval: int = choices.VALIDATION_INTERVAL
    """Steps between two validations."""
    limit_val_batches: int = choices.VALIDATION_BATCHES
    """Batches of a validation."""
    log_interval: int = choices.LOG_INTERVAL
    """Steps between two lines of the log."""


@dataclass(frozen=True, kw_only=True)
class PretrainingRun(TrainingRun):
    """The learning rates of a pretraining of any length, with its logging and checkpoints."""

    max_lr: float
    min_lr: float
    warmup_steps: int = choices.WARMUP_STEPS
    """Optimizer steps from near zero to `max_lr`."""
    lr_shape: str = "cosine"
    """Shape of the learning rate from `max_lr` to `min_lr`: "cosine", "linear" or "constant"."""
    expert_lr_multiplier: float = 1.0
    """The experts' learning rate, as a multiple of that of everything else."""

    pipeline_recompute: tuple[tuple[int, ...], ...] | None = None
    """`[stage][virtual stage]` is the number of layers of that chunk, from its first, that are recomputed in full."""
    kept_checkpoints: int = 1
    """Number of the last checkpoints that are kept; -1 keeps all."""
    similarity_interval: int = choices.SIMILARITY_INTERVAL
    """Steps between two measurements of the experts' similarity."""
    data_seed: int = 1
    """Seed of the order of the samples."""


@dataclass(frozen=True, kw_only=True)
class Pretraining(PretrainingRun):
    """A pretraining as long as its tokens: `tokens` along the learning rate's shape, then `decay_tokens` to zero."""

    tokens: float
    decay_tokens: float | None = None
    saved_tokens: float | None = None
    """Tokens between two checkpoints; None saves at the usual number of steps."""

    @property
    def decay_steps(self) -> int:
        """Return the optimizer steps in which the learning rate goes linearly from `min_lr` to zero.

        Raises:
            ConfigurationError: A size that is not above 0, by its name.
        """
        if self.decay_tokens is None:
            return 0
        return steps(self.decay_tokens, self.seq_length, self.global_batch_size)

    @property
    def max_steps(self) -> int:
        """Return the number of all optimizer steps.

        Raises:
            ConfigurationError: A size that is not above 0, by its name.
        """
        return steps(self.tokens, self.seq_length, self.global_batch_size) + self.decay_steps

    @property
    def save_interval(self) -> int:
        """Return the number of steps between two checkpoints.

        Raises:
            ConfigurationError: A size that is not above 0, by its name.
        """
        if self.saved_tokens is None:
            return choices.SAVE_INTERVAL
        return steps(self.saved_tokens, self.seq_length, self.global_batch_size)


@dataclass(frozen=True, kw_only=True)
class Demonstration(PretrainingRun):
    """A pretraining for a laptop: a given number of steps in float32, and a checkpoint at their end."""

    precision: str = "32"
    max_steps: int
    decay_steps: int = 0
    saved_steps: int | None = None
    """Steps between two checkpoints; None saves at the end."""

    @property
    def save_interval(self) -> int:
        """Steps between two checkpoints."""
        return self.max_steps if self.saved_steps is None else self.saved_steps


@dataclass(frozen=True, kw_only=True)
class Finetuning(TrainingRun):
    """A finetuning: a warm-up, then a cosine from the peak to zero."""

    max_steps: int
    given_warmup_steps: int | None = None
    """Optimizer steps of the warm-up. None is the usual share of the run."""

    @property
    def warmup_steps(self) -> int:
        """Optimizer steps from near zero to the peak."""
        if self.given_warmup_steps is not None:
            return self.given_warmup_steps
        return min(choices.FINETUNE_WARMUP_STEPS, self.max_steps // 10)

    @property
    def save_interval(self) -> int:
        """Steps between two checkpoints: there is one, at the end."""
        return self.max_steps

    @property
    def decay_steps(self) -> int:
        """Optimizer steps to zero after the cosine, which ends there."""
        return 0


def steps(tokens: float, seq_length: int, global_batch_size: int) -> int:
    """Return the number of optimizer steps that see at least `tokens` tokens.

    Raises:
        ConfigurationError: A number is not above 0. The message names it.
    """
    for name, value in (
        ("tokens", tokens),
        ("seq_length", seq_length),
        ("global_batch_size", global_batch_size),
    ):
        if not 0 < value < math.inf:
            raise ConfigurationError(f"{name} is {value}, expected a finite number above 0")
    return -(-round(tokens) // (seq_length * global_batch_size))
