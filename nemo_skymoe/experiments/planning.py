"""The options of `skymoe plan` for a training in plain values."""

from collections.abc import Mapping
from typing import Any

from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.experiments.runs import TrainingRun

_CAPACITY = {
    "moe_expert_capacity_factor": "capacity_factor",
    "moe_pad_expert_input_to_capacity": "pad_to_capacity",
}


def planner_options(run: TrainingRun, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return the planner's model, batch and parallel sizes. The hardware is not among them.

    Args:
        run: The training.
        overrides: Options of the model, by Megatron's names, that take the place of the training's.

    Raises:
        ConfigurationError: An override is a size, which a plan takes from the training.
    """
    for name in overrides:
        if name.endswith("_parallel_size") or name in run.architecture.megatron_sizes():
            raise ConfigurationError(
                f"model.{name} is {overrides[name]!r}, expected none with a plan, which takes the sizes of the recipe"
            )
    experts: dict[str, Any] = {}
    if run.architecture.num_moe_experts is not None:
        given = {ours: overrides[name] for name, ours in _CAPACITY.items() if name in overrides}
        experts = {"expert_parallel": run.edp, "capacity_factor": run.expert_capacity_factor, **given}
    return {
        "num_gpus": run.num_nodes * run.num_gpus_per_node,
        "tensor_parallel": run.edp,
        "sequence_parallel": run.edp > 1,
        "pipeline_parallel": run.pipeline_parallelism,
        "seq_length": run.seq_length,
        "global_batch_size": run.global_batch_size,
        "micro_batch_size": run.micro_batch_size,
        "overlap_grad_reduce": run.precision != "32",
        **experts,
    }
