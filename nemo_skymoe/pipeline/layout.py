"""A pipeline layout says which blocks each chunk holds and which of its layers are recomputed; its costs follow."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, groupby, pairwise

from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.pipeline.problem import Block, PipelineProblem
from nemo_skymoe.pipeline.schedule import in_flight

_LETTERS = {"embedding": "E", "layer": "t", "head": "L"}


@dataclass(frozen=True)
class Chunk:
    """Consecutive blocks that one stage runs together. The first `recomputed` of their layers are recomputed."""

    blocks: tuple[Block, ...]
    recomputed: int = 0

    def __post_init__(self) -> None:
        if not self.blocks:
            raise ConfigurationError("a chunk holds no block, expected at least one")
        if not 0 <= self.recomputed <= self.layers:
            raise ConfigurationError(f"recomputed is {self.recomputed}, expected 0 to {self.layers} layers")

    @cached_property
    def layers(self) -> int:
        """Number of transformer layers."""
        return sum(block.kind == "layer" for block in self.blocks)

    @cached_property
    def forward(self) -> float:
        """Seconds of the forward pass."""
        return sum(block.forward for block in self.blocks)

    @cached_property
    def backward(self) -> float:
        """Seconds of the backward pass, without recomputation."""
        return sum(block.backward for block in self.blocks)

    @cached_property
    def recompute(self) -> float:
        """Seconds that recomputation adds to the backward."""
        return sum(
            block.recompute for block, again in zip(self.blocks, self._recomputes, strict=True) if again
        )

    @cached_property
    def weights(self) -> float:
        """Bytes of weights, gradients and optimizer state."""
        return sum(block.weights for block in self.blocks)

    @cached_property
    def held(self) -> float:
        """Bytes that are kept from a micro-batch's forward to its backward."""
        return sum(self._kept)

    @cached_property
    def peak(self) -> float:
        """Bytes that the running micro-batch takes at most.

        When the backward pass reaches a block, everything behind it is already freed. A recomputed layer then has its
        activations back instead of its checkpoint.
        """
        rows = zip(self.blocks, self._recomputes, accumulate(self._kept), strict=True)
        return max(
            kept + block.working + (block.activations - block.checkpoint if again else 0.0)
            for block, again, kept in rows
        )

    @property
    def _recomputes(self) -> list[bool]:
        seen = accumulate(block.kind == "layer" for block in self.blocks)
        return [
            block.kind == "layer" and number <= self.recomputed
            for block, number in zip(self.blocks, seen, strict=True)
        ]

    @property
    def _kept(self) -> list[float]:
        rows = zip(self.blocks, self._recomputes, strict=True)
        return [block.checkpoint if again else block.activations for block, again in rows]


@dataclass(frozen=True)
class Layout:
    """A cut of a problem's blocks into chunks, in model order. Chunk c runs on stage c modulo the number of stages.

    `cuts` is the first block of every chunk, and then the number of blocks. `recomputed` is the number of layers of
    every chunk that are recomputed, from its first, as Megatron's `block` method does.
    """

    problem: PipelineProblem
    cuts: tuple[int, ...]
    recomputed: tuple[int, ...]

    def __post_init__(self) -> None:
        chunks = self.problem.stages * self.problem.virtual_stages
        if len(self.recomputed) != chunks or len(self.cuts) != chunks + 1:
            raise ConfigurationError(
                f"a layout has {len(self.cuts)} cuts and {len(self.recomputed)} recomputed counts, expected"
                f" {chunks + 1} and {chunks} for {self.problem.stages} stages x"
                f" {self.problem.virtual_stages} virtual stages"
            )
        blocks = len(self.problem.blocks)
        if (self.cuts[0], self.cuts[-1]) != (0, blocks):
            raise ConfigurationError(f"cuts are {self.cuts}, expected to begin with 0 and end with {blocks}")
        _ = self.chunks

    @cached_property
    def chunks(self) -> tuple[Chunk, ...]:
        """All chunks, in model order."""
        ranges = zip(pairwise(self.cuts), self.recomputed, strict=True)
        return tuple(Chunk(tuple(self.problem.blocks[start:stop]), count) for (start, stop), count in ranges)

    def chunks_of(self, stage: int) -> tuple[Chunk, ...]:
        """Return the chunks of one stage, in the order of the virtual stages."""
        return self.chunks[stage :: self.problem.stages]

    @property
    def layers(self) -> list[int]:
        """Number of transformer layers of every stage."""
        return [sum(chunk.layers for chunk in self.chunks_of(stage)) for stage in self._stages]

    @property
    def recomputed_layers(self) -> list[int]:
        """Number of recomputed layers of every stage."""
        return [sum(chunk.recomputed for chunk in self.chunks_of(stage)) for stage in self._stages]

    @property
    def recompute(self) -> tuple[tuple[int, ...], ...]:
        """Recomputed layers by stage and virtual stage, as `apply_recompute` takes them."""
        return tuple(self.recomputed[stage :: self.problem.stages] for stage in self._stages)

    @cached_property
    def times(self) -> list[float]:
        """Seconds that a stage spends on one micro-batch: forward, recomputation, backward and transfers."""
        return [
            sum(chunk.forward + chunk.recompute + chunk.backward for chunk in self.chunks_of(stage))
            + transfer_time(self.problem, stage)
            for stage in self._stages
        ]

    @property
    def slack(self) -> list[float]:
        """Seconds per micro-batch that a stage waits for the slowest one in the steady state."""
        slowest = max(self.times)
        return [slowest - time for time in self.times]

    @cached_property
    def memory(self) -> list[float]:
        """Bytes that a stage needs at its worst moment."""
        return [self._memory(stage) for stage in self._stages]

    @property
    def memory_slack(self) -> list[float]:
        """Bytes left under the limit, negative if a stage does not fit."""
        return [self.problem.memory_limit - memory for memory in self.memory]

    def to_megatron_layout(self) -> str:
        """Write the layout as Megatron's `pipeline_model_parallel_layout`, for example `Et*4|(t*5|)*10t*4L`."""
        names = ["".join(_LETTERS[block.kind] for block in chunk.blocks) for chunk in self.chunks]
        return _compressed([_short(name) for name in names])

    @property
    def _stages(self) -> range:
        return range(self.problem.stages)

    def _memory(self, stage: int) -> float:
        chunks, problem = self.chunks_of(stage), self.problem
        moments = in_flight(stage, problem.stages, problem.virtual_stages, problem.micro_batches)
        return sum(chunk.weights for chunk in chunks) + max(
            chunks[running].peak + sum(count * chunk.held for count, chunk in zip(held, chunks, strict=True))
            for held, running in moments
        )


def transfer_time(problem: PipelineProblem, stage: int) -> float:
    """Return the seconds per micro-batch for which sending and receiving block a stage.

    1F1B exchanges with either neighbour twice per micro-batch. Each exchange carries an activation one way and a
    gradient the other. Interleaved 1F1B runs with `overlap_p2p_comm`, which blocks nothing.
    """
    if problem.virtual_stages > 1 or problem.stages == 1:
        return 0.0
    return problem.transfer * (1 if stage in (0, problem.stages - 1) else 2)


def _short(name: str) -> str:
    layers = name.count("t")
    return name.replace("t" * layers, f"t*{layers}") if layers > 1 else name


def _compressed(names: Sequence[str]) -> str:
    """Join chunks by `|`, and write equal neighbours as `(chunk|)*count`; the last chunk has no bar."""
    runs = [(name, len(list(same))) for name, same in groupby(names[:-1])]
    return "".join(f"({name}|)*{count}" if count > 1 else f"{name}|" for name, count in runs) + names[-1]
