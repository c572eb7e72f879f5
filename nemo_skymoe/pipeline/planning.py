"""`plan` turns plain values into a pipeline plan."""

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from itertools import accumulate
from typing import Any

from nemo_skymoe.architecture import Architecture, as_architecture
from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.pipeline.cost import CostModel
from nemo_skymoe.pipeline.efficiency import Efficiency
from nemo_skymoe.pipeline.hardware import Hardware, hardware_preset
from nemo_skymoe.pipeline.layout import Layout
from nemo_skymoe.pipeline.planner import best_layout
from nemo_skymoe.pipeline.plans import Plan
from nemo_skymoe.pipeline.problem import PipelineProblem
from nemo_skymoe.pipeline.profile import measured_blocks
from nemo_skymoe.pipeline.simulator import simulate
from nemo_skymoe.pipeline.training import Training


def plan(
    model: str | Architecture | Mapping[str, Any],
    hardware: str | Hardware,
    *,
    num_gpus: int | None = None,
    data_parallel: int | None = None,
    recompute: bool = True,
    memory_limit: float | None = None,
    layers: Sequence[int] | None = None,
    profile: Mapping[str, Any] | None = None,
    efficiency: Efficiency | None = None,
    **training: Any,
) -> Plan:
    """Choose the layout of a pipeline and the layers to recompute, and predict the time and memory of a step.

    Args:
        model: See `as_architecture`.
        hardware: A name of `hardware.PRESETS`, or a `Hardware`.
        num_gpus: Number of all GPUs, from which `data_parallel` follows.
        data_parallel: Number of data-parallel ranks, in place of `num_gpus`.
        recompute: Whether layers may be recomputed where memory is short.
        memory_limit: Bytes of one GPU that may be used; None for all of the hardware's memory.
        layers: Number of layers of every chunk, in the model's order (virtual stage by virtual stage). The function
            then predicts this layout instead of choosing one. The embedding is in its first chunk, and the head in its
            last.
        profile: Measured seconds and bytes of blocks, see `profile.measured_blocks`.
        efficiency: Other constants of the cost model.
        **training: Fields of `Training`: `tensor_parallel`, `pipeline_parallel`, `virtual_pipeline`, `expert_parallel`,
            `seq_length`, `micro_batch_size`, `global_batch_size`, `capacity_factor` and others. By default
            `sequence_parallel` is on if `tensor_parallel` is above 1.

    Raises:
        ConfigurationError: Options do not go together, and the message names them; or no layout fits, and it says by
            how much.
    """
    architecture = as_architecture(model)
    gpu = hardware if isinstance(hardware, Hardware) else hardware_preset(hardware)
    how = _training(training, num_gpus, data_parallel)
    _check_layers_of_both_kinds(architecture, how)
    limit = gpu.memory if memory_limit is None else memory_limit
    constants = efficiency or Efficiency()
    if not limit > constants.memory_overhead:
        raise ConfigurationError(
            f"memory_limit is {limit / 1e9:.1f} GB, expected more than the {constants.memory_overhead / 1e9:.1f} GB for"
            " context, buffers and fragmentation"
        )
    problem = _measured(CostModel(architecture, how, gpu, constants).problem(limit), architecture, profile)
    if not recompute:
        problem = _without_recomputation(problem)
    if layers is not None:
        _check_layers(problem, layers)
    try:
        solution = best_layout(problem) if layers is None else given_layout(problem, layers)
    except ConfigurationError as reason:
        raise ConfigurationError(_explained(str(reason), limit, constants, recompute)) from None
    return Plan(architecture, gpu, how, constants, limit, solution, simulate(solution))


def _check_layers_of_both_kinds(architecture: Architecture, how: Training) -> None:
    how.check(architecture)
    if architecture.layers_differ:  # tensor parallelism splits the MLP of dense layers
        alone = replace(how, expert_parallel=1, capacity_factor=None, pad_to_capacity=False)
        alone.check(architecture.of_layers(moe=False))


def _measured(
    problem: PipelineProblem, architecture: Architecture, profile: Mapping[str, Any] | None
) -> PipelineProblem:
    if profile is None:
        return problem
    if architecture.layers_differ and not isinstance(profile.get("layer", []), list):
        raise ConfigurationError(
            "profile has one layer for all, expected a list: the layers of this model differ"
        )
    return replace(problem, blocks=measured_blocks(problem.blocks, profile))


def _without_recomputation(problem: PipelineProblem) -> PipelineProblem:
    return replace(problem, blocks=[replace(block, checkpoint=block.activations) for block in problem.blocks])


def given_layout(problem: PipelineProblem, layers: Sequence[int]) -> Layout:
    """Return the layout with these layers in every chunk, recomputing the first layers until each stage fits.

    Raises:
        ConfigurationError: A stage lacks memory even with all of its layers recomputed.
    """
    chunks = problem.stages * problem.virtual_stages
    first, last = problem.blocks[0].kind == "embedding", len(problem.blocks)
    cuts = (0, *accumulate((count + (first and not chunk) for chunk, count in enumerate(layers[:-1]))), last)
    recomputed = [0] * chunks
    layout = Layout(problem, cuts, tuple(recomputed))
    for stage in range(problem.stages):
        while layout.memory_slack[stage] < 0:
            free = [
                chunk for chunk in range(stage, chunks, problem.stages) if recomputed[chunk] < layers[chunk]
            ]
            if not free:
                raise ConfigurationError(
                    f"layers {list(layers)} do not fit: stage {stage} of {problem.stages} needs"
                    f" {-layout.memory_slack[stage] / 1e9:.2f} GB more"
                )
            recomputed[free[0]] += 1
            layout = Layout(problem, cuts, tuple(recomputed))
    return layout


def _check_layers(problem: PipelineProblem, layers: Sequence[int]) -> None:
    chunks = problem.stages * problem.virtual_stages
    total = sum(block.kind == "layer" for block in problem.blocks)
    if len(layers) != chunks or sum(layers) != total or min(layers) < 0:
        raise ConfigurationError(
            f"layers is {list(layers)}: {sum(layers)} layers in {len(layers)} chunks, expected {total} in"
            f" {problem.stages} stages x {problem.virtual_stages} virtual stages"
        )


def _training(options: Mapping[str, Any], num_gpus: int | None, data_parallel: int | None) -> Training:
    known = {field.name for field in fields(Training)}
    if unknown := set(options) - known:
        raise ConfigurationError(f"plan has no option {sorted(unknown)}, expected some of {sorted(known)}")
    if data_parallel is None:
        data_parallel = _data_parallel(options, num_gpus)
    sequence_parallel = options.get("sequence_parallel")
    if sequence_parallel is None:
        sequence_parallel = options.get("tensor_parallel", 1) > 1
    training = Training(**{**options, "data_parallel": data_parallel, "sequence_parallel": sequence_parallel})
    if num_gpus not in (None, training.num_gpus):
        raise ConfigurationError(
            f"num_gpus is {num_gpus}, expected tensor_parallel x pipeline_parallel x data_parallel ="
            f" {training.num_gpus}, or one of num_gpus and data_parallel"
        )
    return training


def _data_parallel(options: Mapping[str, Any], num_gpus: int | None) -> int:
    if num_gpus is None:
        raise ConfigurationError("neither num_gpus nor data_parallel is given, expected one of them")
    tensor, pipeline = options.get("tensor_parallel", 1), options.get("pipeline_parallel", 1)
    if num_gpus < 1 or num_gpus % (tensor * pipeline):
        raise ConfigurationError(
            f"num_gpus is {num_gpus}, expected a multiple of tensor_parallel ({tensor}) x pipeline_parallel"
            f" ({pipeline}) = {tensor * pipeline}"
        )
    return num_gpus // (tensor * pipeline)


def _explained(reason: str, limit: float, constants: Efficiency, recompute: bool) -> str:
    """Add to a planner's message where its memory limit comes from."""
    if not recompute:
        reason = reason.replace(" with every layer recomputed", "") + "; recompute is off"
    return (
        f"{reason} (memory_limit of {limit / 1e9:.1f} GB less {constants.memory_overhead / 1e9:.1f} GB for context,"
        " buffers and fragmentation): more pipeline or tensor parallelism, or a smaller micro-batch, needs less"
    )
