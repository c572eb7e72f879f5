"""A pipeline plan: the question, the chosen layout, and its predicted time and memory."""

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from nemo_skymoe.architecture import Architecture
from nemo_skymoe.pipeline.efficiency import Efficiency
from nemo_skymoe.pipeline.flops import FORMULA, PADDED_FORMULA, model_flops
from nemo_skymoe.pipeline.hardware import Hardware
from nemo_skymoe.pipeline.layout import Chunk, Layout
from nemo_skymoe.pipeline.simulator import Simulation
from nemo_skymoe.pipeline.training import Training


@dataclass(frozen=True)
class StagePlan:
    """One stage as one of its GPUs sees it. Lists have one entry per virtual stage."""

    stage: int
    layers: tuple[int, ...]
    embedding: bool
    head: bool
    recomputed: tuple[int, ...]
    """Number of layers that are recomputed because memory is short: the first ones of each chunk."""
    time: float
    """Seconds of one micro-batch: forward, recomputation, backward, and transfers that block."""
    slack: float
    """Seconds per micro-batch that the stage waits for the slowest one in the steady state."""
    free_recompute: int
    """Number of layers that could be recomputed in the slack. They are not, because in warm-up and cool-down it would
    cost time."""
    memory: float
    """Bytes at the worst moment, with the fixed overhead included."""
    memory_slack: float
    """Bytes left under the limit."""


@dataclass(frozen=True)
class Plan:
    """The layout of a pipeline and its prediction. Nothing in it was measured, unless a profile was given."""

    model: Architecture
    hardware: Hardware
    training: Training
    efficiency: Efficiency
    memory_limit: float
    """Bytes of one GPU that may be used."""
    solution: Layout
    simulation: Simulation

    @cached_property
    def layout(self) -> str:
        """Megatron's `pipeline_model_parallel_layout`."""
        return self.solution.to_megatron_layout()

    @cached_property
    def recompute(self) -> list[list[int]]:
        """`recompute[stage][virtual_stage]` recomputed layers, as `pipeline.apply` takes them."""
        return [list(stage.recomputed) for stage in self.stages]

    @cached_property
    def stages(self) -> tuple[StagePlan, ...]:
        """The plan of every stage."""
        return tuple(self._stage(stage) for stage in range(self.training.pipeline_parallel))

    @property
    def step_time(self) -> float:
        """Seconds of one step: the simulated pipeline, gradient reduction and parameter gathering."""
        return self.simulation.step_time

    @property
    def bubble(self) -> float:
        """Share of the pipeline's time in which GPUs compute nothing."""
        return self.simulation.bubble_fraction

    @property
    def tokens_per_gpu_per_second(self) -> float:
        """Tokens of the global batch divided by the step time and the number of GPUs."""
        tokens = self.training.global_batch_size * self.training.seq_length
        return tokens / self.step_time / self.training.num_gpus

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation by `flops.FORMULA`, without recomputation and without empty places of experts."""
        return self._utilisation(1.0)

    @property
    def padded_mfu(self) -> float:
        """Model FLOPs utilisation that counts the experts' whole capacity."""
        return self._utilisation(self.training.capacity)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values, in seconds and bytes."""
        return {
            "layout": self.layout,
            "recompute": self.recompute,
            "stages": [asdict(stage) for stage in self.stages],
            "micro_batches": self.training.micro_batches,
            "bubble": self.bubble,
            "step_time": self.step_time,
            "tail": self.solution.problem.tail,
            "tokens_per_gpu_per_second": self.tokens_per_gpu_per_second,
            "mfu": {"value": self.mfu, "flops_per_token": self._flops(1.0), "formula": FORMULA},
            "padded_mfu": {
                "value": self.padded_mfu,
                "flops_per_token": self._flops(self.training.capacity),
                "formula": PADDED_FORMULA,
            },
            "memory_limit": self.memory_limit,
            "model": {**asdict(self.model), "parameters": self.model.parameters},
            "hardware": asdict(self.hardware),
            "training": {**asdict(self.training), "num_gpus": self.training.num_gpus},
            "efficiency": asdict(self.efficiency),
        }

    def _flops(self, capacity: float) -> float:
        return model_flops(self.model, self.training.seq_length, capacity).total

    def _utilisation(self, capacity: float) -> float:
        return self.tokens_per_gpu_per_second * self._flops(capacity) / self.hardware.peak_flops

    def _stage(self, stage: int) -> StagePlan:
        chunks = self.solution.chunks_of(stage)
        kinds = [block.kind for chunk in chunks for block in chunk.blocks]
        memory = self.solution.memory[stage] + self.efficiency.memory_overhead
        return StagePlan(
            stage,
            layers=tuple(chunk.layers for chunk in chunks),
            embedding="embedding" in kinds,
            head="head" in kinds,
            recomputed=tuple(chunk.recomputed for chunk in chunks),
            time=self.solution.times[stage],
            slack=self.solution.slack[stage],
            free_recompute=_free_recompute(chunks, self.solution.slack[stage]),
            memory=memory,
            memory_slack=self.memory_limit - memory,
        )


def _free_recompute(chunks: tuple[Chunk, ...], slack: float) -> int:
    """Count the layers that are not recomputed and could be within `slack` seconds."""
    costs = [
        block.recompute
        for chunk in chunks
        for block in [block for block in chunk.blocks if block.kind == "layer"][chunk.recomputed :]
    ]
    count = 0
    for cost in costs:
        slack -= cost
        if slack < 0:
            break
        count += 1
    return count
