"""`plan` turns plain values into a pipeline plan."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, fields, replace
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
    question = Question(
        as_architecture(model),
        hardware if isinstance(hardware, Hardware) else hardware_preset(hardware),
        efficiency or Efficiency(),
        memory_limit=memory_limit,
        recompute=recompute,
        profile=profile,
    )
    how = question.training(training, num_gpus=num_gpus, data_parallel=data_parallel)
    return plan_of(question, how, question.problem(how), layers)


@dataclass(frozen=True)
class Question:
    """What a plan is for, apart from the sizes of the training: the model, the hardware, and how memory may be used.

    Raises:
        ConfigurationError: `memory_limit` leaves no room for a model.
    """

    model: Architecture
    hardware: Hardware
    efficiency: Efficiency = field(default_factory=Efficiency)
    _: KW_ONLY
    memory_limit: float | None = None
    """Bytes of one GPU that may be used; None for all of the hardware's memory."""
    recompute: bool = True
    profile: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if not self.limit > self.efficiency.memory_overhead:
            raise ConfigurationError(
                f"memory_limit is {self.limit / 1e9:.1f} GB, expected more than the"
                f" {self.efficiency.memory_overhead / 1e9:.1f} GB for context, buffers and fragmentation"
            )

    @property
    def limit(self) -> float:
        """Bytes of one GPU that may be used."""
        return self.hardware.memory if self.memory_limit is None else self.memory_limit

    def training(
        self, options: Mapping[str, Any], *, num_gpus: int | None = None, data_parallel: int | None = None
    ) -> Training:
        """Return the training with these options, checked against the model. The errors are those of `plan`."""
        made = _training(options, num_gpus, data_parallel)
        _check_layers_of_both_kinds(self.model, made)
        return made

    def problem(self, training: Training) -> PipelineProblem:
        """Return the planner's problem. The errors are those of `plan`."""
        model = CostModel(self.model, training, self.hardware, self.efficiency)
        problem = _measured(model.problem(self.limit), self.model, self.profile)
        return problem if self.recompute else _without_recomputation(problem)


def plan_of(
    question: Question, training: Training, problem: PipelineProblem, layers: Sequence[int] | None = None
) -> Plan:
    """Solve the problem that `question` makes of a training, or predict the given `layers`; see `plan`."""
    if layers is not None:
        _check_layers(problem, layers)
    try:
        solution = best_layout(problem) if layers is None else given_layout(problem, layers)
    except ConfigurationError as reason:
        raise ConfigurationError(_explained(str(reason), question)) from None
    return Plan(
        question.model,
        question.hardware,
        training,
        question.efficiency,
        question.limit,
        solution,
        simulate(solution),
    )


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
            f"num_gpus is {num_gpus}, expected tensor_parallel x context_parallel x pipeline_parallel x data_parallel"
            f" = {training.num_gpus}, or one of num_gpus and data_parallel"
        )
    return training


def _data_parallel(options: Mapping[str, Any], num_gpus: int | None) -> int:
    if num_gpus is None:
        raise ConfigurationError("neither num_gpus nor data_parallel is given, expected one of them")
    sizes = {
        name: options.get(name, 1) for name in ("tensor_parallel", "context_parallel", "pipeline_parallel")
    }
    named = {name: size for name, size in sizes.items() if size != 1 or name != "context_parallel"}
    product = math.prod(sizes.values())
    if product < 1:
        return 1  # `Training` refuses the size
    if num_gpus < 1 or num_gpus % product:
        factors = " x ".join(f"{name} ({size})" for name, size in named.items())
        raise ConfigurationError(f"num_gpus is {num_gpus}, expected a multiple of {factors} = {product}")
    return num_gpus // product


def _explained(reason: str, question: Question) -> str:
    """Add to a planner's message where its memory limit comes from."""
    if not question.recompute:
        reason = reason.replace(" with every layer recomputed", "") + "; recompute is off"
    return (
        f"{reason} (memory_limit of {question.limit / 1e9:.1f} GB less"
        f" {question.efficiency.memory_overhead / 1e9:.1f} GB for context, buffers and fragmentation): more pipeline or"
        " tensor parallelism, or a smaller micro-batch, needs less"
    )
