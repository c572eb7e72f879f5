"""The problem of a pipeline planner in plain numbers, with one entry per block and one limit for all stages."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields

from nemo_skymoe.config import ConfigurationError


@dataclass(frozen=True)
class Block:
    """A part of the model that cannot be split: the embedding, a transformer layer, or the head with norm and loss.

    Times are seconds for one micro-batch on one GPU. Memory is bytes on one GPU.
    """

    kind: str
    """`embedding`, `layer` or `head`."""
    forward: float
    backward: float
    weights: float
    """Bytes of weights, gradients and optimizer state."""
    activations: float
    """Bytes held from a micro-batch's forward to its backward, without recomputation."""
    checkpoint: float = 0.0
    """Bytes held if the block is recomputed: its input."""
    recompute: float = 0.0
    """Seconds that the backward takes longer if the block is recomputed."""
    working: float = 0.0
    """Bytes needed only while the block runs."""

    def __post_init__(self) -> None:
        if self.kind not in ("embedding", "layer", "head"):
            raise ConfigurationError(f"kind is {self.kind!r}, expected embedding, layer or head")
        for item in fields(self):
            if item.name != "kind" and not getattr(self, item.name) >= 0:
                raise ConfigurationError(
                    f"{item.name} of a block is {getattr(self, item.name)}, expected 0 or more"
                )
        if self.checkpoint > self.activations:
            raise ConfigurationError(
                f"checkpoint of a block is {self.checkpoint}, expected at most its activations"
                f" ({self.activations}): recomputation cannot need more memory"
            )

    @property
    def time(self) -> float:
        """Seconds of forward and backward, without recomputation."""
        return self.forward + self.backward


@dataclass(frozen=True)
class PipelineProblem:
    """Blocks in order, to be cut into `stages` contiguous stages (times `virtual_stages` chunks each).

    Raises:
        ConfigurationError: The blocks are out of order or too few, or the numbers do not go together.
    """

    blocks: Sequence[Block]
    stages: int
    micro_batches: int
    memory_limit: float
    """Bytes of one GPU that the plan may use."""
    virtual_stages: int = 1
    transfer: float = 0.0
    """Seconds to send one micro-batch's activations to the next stage."""
    tail: float = field(default=0.0)
    """Seconds at the end of a step that no layout changes (gradient reduction, optimizer)."""

    def __post_init__(self) -> None:
        for name in ("stages", "micro_batches", "virtual_stages"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name} is {getattr(self, name)}, expected at least 1")
        self._check_blocks()
        self._check_interleaving()

    def _check_blocks(self) -> None:
        kinds = [block.kind for block in self.blocks]
        if "embedding" in kinds[1:] or "head" in kinds[:-1]:
            raise ConfigurationError("blocks are out of order, expected embedding, layers, head")
        layers, chunks = kinds.count("layer"), self.stages * self.virtual_stages
        if layers < chunks:
            raise ConfigurationError(
                f"{layers} layers on {self.stages} stages x {self.virtual_stages} virtual stages leave"
                f" {chunks - layers} of them empty: expected at least one layer each"
            )

    def _check_interleaving(self) -> None:
        if self.virtual_stages == 1:
            return
        if self.stages == 1:
            raise ConfigurationError("virtual_stages is above 1 on one stage: interleaving needs two or more")
        if self.micro_batches % self.stages:
            raise ConfigurationError(
                f"micro_batches is {self.micro_batches}, expected a multiple of stages ({self.stages}):"
                " Megatron's interleaved schedule takes micro-batches in groups of that many"
            )
