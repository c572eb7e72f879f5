"""The cost of a training in FLOPs and GPU-hours, by the pipeline planner's model of time and memory."""

from dataclasses import dataclass, replace
from functools import cache

from nemo_skymoe.architecture import Architecture
from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.pipeline.flops import model_flops
from nemo_skymoe.pipeline.hardware import Hardware, hardware_preset
from nemo_skymoe.pipeline.planning import plan
from nemo_skymoe.pipeline.plans import Plan
from nemo_skymoe.quantities import check_positive

_TENSOR_PARALLEL = (1, 2, 4, 8)


@dataclass(frozen=True)
class Cluster:
    """The hardware and batch that both models would be trained on."""

    hardware: Hardware
    num_gpus: int
    seq_length: int
    global_batch_size: int
    """Sequences of a step."""
    capacity_factor: float | None = None
    """Capacity factor of the MoE's experts; None for dropless."""

    @classmethod
    def of(cls, hardware: str | Hardware, num_gpus: int, seq_length: int, global_batch_size: int,
           capacity_factor: float | None = None) -> "Cluster":  # fmt: skip
        """Return the cluster with GPUs of this name.

        Raises:
            ConfigurationError: The name is unknown, or a size is not positive.
        """
        check_positive(num_gpus=num_gpus, seq_length=seq_length, global_batch_size=global_batch_size)
        gpu = hardware if isinstance(hardware, Hardware) else hardware_preset(hardware)
        return cls(gpu, num_gpus, seq_length, global_batch_size, capacity_factor)


@dataclass(frozen=True)
class TrainingCost:
    """The predicted cost of training one model on a number of tokens."""

    tokens: int
    flops: float
    """Model FLOPs by `pipeline.flops.FORMULA`."""
    gpu_hours: float
    plan: Plan
    """The plan with the parallel sizes of these GPU-hours, which are the fastest that fit."""


def training_cost(model: Architecture, tokens: int, cluster: Cluster) -> TrainingCost:
    """Predict the cost of `tokens` tokens. Experts are spread by EDP, over the tensor-parallel group.

    Raises:
        ConfigurationError: No parallel sizes fit the GPUs' number and memory and the batch.
    """
    fastest = _fastest_plan(model, cluster)
    flops = model_flops(model, cluster.seq_length).total * tokens
    return TrainingCost(tokens, flops, tokens / fastest.tokens_per_gpu_per_second / 3600, fastest)


@cache  # a comparison asks for the same models again and again
def _fastest_plan(model: Architecture, cluster: Cluster) -> Plan:
    if model.num_moe_experts is None:
        cluster = replace(cluster, capacity_factor=None)
    best, refusal = None, None
    for tensor in _TENSOR_PARALLEL:
        for stages in range(1, min(model.num_layers, cluster.num_gpus // tensor) + 1):
            if cluster.num_gpus % (tensor * stages) or tensor > cluster.hardware.gpus_per_node:
                continue
            try:
                found = _even_plan(model, cluster, tensor, stages)
            except ConfigurationError as reason:
                refusal = reason
                continue
            if best is None or found.tokens_per_gpu_per_second > best.tokens_per_gpu_per_second:
                best = found
    if best is None:
        kind = "MoE" if model.num_moe_experts else "dense model"
        raise ConfigurationError(
            f"num_gpus is {cluster.num_gpus} {cluster.hardware.name} with global_batch_size"
            f" {cluster.global_batch_size}: no parallel sizes train the {kind}, the last refusal being: {refusal}"
        )
    return best


def _even_plan(model: Architecture, cluster: Cluster, tensor: int, stages: int) -> Plan:
    """Plan with as many layers on every stage, which is quick and ranks parallel sizes well enough."""
    few, more = divmod(model.num_layers, stages)
    return plan(
        model,
        cluster.hardware,
        num_gpus=cluster.num_gpus,
        layers=[few + (stage < more) for stage in range(stages)],
        tensor_parallel=tensor,
        pipeline_parallel=stages,
        expert_parallel=tensor if model.num_moe_experts else 1,
        seq_length=cluster.seq_length,
        global_batch_size=cluster.global_batch_size,
        capacity_factor=cluster.capacity_factor,
    )
