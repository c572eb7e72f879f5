"""`advise` answers whether to upcycle a dense checkpoint or to train the MoE from scratch."""

from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from typing import Any

from nemo_skymoe.advice import figure1, rule
from nemo_skymoe.advice.cost import Cluster, TrainingCost, training_cost
from nemo_skymoe.advice.figure1 import Rates, Schedule
from nemo_skymoe.advice.rule import Answer
from nemo_skymoe.architecture import Architecture, as_architecture
from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.quantities import check_positive

COSTS = ("sunk", "cumulative")


@dataclass(frozen=True)
class Measure:
    """One way to count the costs, and the answer of section 3.3 by it."""

    name: str
    dense: float
    moe: float
    ratio: Fraction | float
    decides: bool

    @property
    def answer(self) -> Answer:
        """The answer by this way of counting alone."""
        return rule.answer(self.ratio)


@dataclass(frozen=True)
class Advice:
    """An answer with its reasons. GPU-hours are predicted; nothing was measured."""

    model: Architecture
    cluster: Cluster
    cost: str
    moe: TrainingCost
    dense: TrainingCost | None
    """Cost of the dense checkpoint, if there is or would be one."""
    finished: bool
    """Whether that checkpoint is at the end of its learning-rate schedule."""
    rates: Rates | None
    """Peak and last learning rate of the dense model; None if they are not known."""

    @cached_property
    def measures(self) -> tuple[Measure, ...]:
        """The report's factor, which holds for top-2 alone, GPU-hours and FLOPs; none of them without a dense model."""
        if self.dense is None:
            return ()
        dense, moe = self.dense, self.moe
        report = Measure(
            f"tokens x {rule.REPORT_GPU_HOURS}, the report's factor",
            dense.tokens,
            rule.REPORT_GPU_HOURS * moe.tokens,
            rule.report_ratio(moe.tokens, dense.tokens),
            decides=True,
        )
        applies = self.model.moe_router_topk == rule.REPORT_TOPK
        hours = (dense.gpu_hours, moe.gpu_hours, moe.gpu_hours / dense.gpu_hours)
        flops = (dense.flops, moe.flops, moe.flops / dense.flops)
        predicted = (
            Measure("GPU-hours, predicted", *hours, decides=not applies),
            Measure("FLOPs", *flops, decides=False),
        )
        return (report, *predicted) if applies else predicted

    @property
    def deciding(self) -> Measure | None:
        """The measure that decides the answer."""
        return next((measure for measure in self.measures if measure.decides), None)

    @property
    def answer(self) -> Answer:
        """Upcycle, from scratch, or neither."""
        if self.deciding is None or self.cost == "cumulative":
            return Answer.SCRATCH
        return self.deciding.answer

    @property
    def same_cost_tokens(self) -> int | None:
        """Tokens of an MoE from scratch that cost as much as dense model and upcycled MoE together; None without a
        dense model."""
        if self.deciding is None:
            return None
        return self.moe.tokens + round(self.moe.tokens / self.deciding.ratio)

    @property
    def schedules(self) -> tuple[Schedule, ...]:
        """Learning rates for the answer, or for both answers in the grey zone."""
        scratch = figure1.scratch_schedule(self.rates)
        if self.dense is None or self.answer is Answer.SCRATCH:
            return (scratch,)
        upcycled = figure1.upcycled_schedule(self.rates, finished=self.finished)
        return (upcycled,) if self.answer is Answer.UPCYCLE else (upcycled, scratch)


def advise(
    model: str | Architecture | dict[str, Any],
    moe_tokens: int,
    *,
    hardware: str,
    num_gpus: int,
    dense_tokens: int | None = None,
    dense_schedule_tokens: int | None = None,
    dense_max_lr: float | None = None,
    dense_min_lr: float | None = None,
    cost: str = "sunk",
    seq_length: int = 4096,
    global_batch_size: int = 1024,
    capacity_factor: float | None = None,
) -> Advice:
    """Answer by section 3.3 whether to upcycle a dense model or to train the MoE from scratch.

    Args:
        model: The MoE, see `as_architecture`. The dense model is the same without experts.
        moe_tokens: Budget of the MoE's training, in tokens.
        hardware: A name of `pipeline.hardware.PRESETS`.
        num_gpus: GPUs of one training. Both models are planned on them.
        dense_tokens: Tokens that the dense checkpoint has seen; None if there is no checkpoint.
        dense_schedule_tokens: Tokens of the dense model's whole learning-rate schedule; None if the checkpoint is at
            its end.
        dense_max_lr: Peak learning rate of the dense model; None if it is not known, or the model is Figure 1's.
        dense_min_lr: Last learning rate of the dense model. It is given together with the peak, or not at all.
        cost: `sunk` if the dense checkpoint exists anyway, `cumulative` if it is trained to be upcycled (section 3.1).
        seq_length: Tokens of a sequence.
        global_batch_size: Sequences of a step.
        capacity_factor: Capacity factor of the MoE's experts; None for dropless.

    Raises:
        ConfigurationError: A value is out of range, and the message names it; or one of the models cannot be trained on
            these GPUs.
    """
    architecture = as_architecture(model)
    check_positive(
        moe_tokens=moe_tokens,
        dense_tokens=dense_tokens,
        dense_schedule_tokens=dense_schedule_tokens,
        dense_max_lr=dense_max_lr,
        dense_min_lr=dense_min_lr,
        capacity_factor=capacity_factor,
    )
    _check(architecture, cost, dense_tokens, dense_schedule_tokens)
    rates = _rates(dense_model(architecture), dense_max_lr, dense_min_lr)
    cluster = Cluster.of(hardware, num_gpus, seq_length, global_batch_size, capacity_factor)
    return Advice(
        architecture,
        cluster,
        cost,
        moe=training_cost(architecture, moe_tokens, cluster),
        dense=None
        if dense_tokens is None
        else training_cost(dense_model(architecture), dense_tokens, cluster),
        finished=dense_schedule_tokens in (None, dense_tokens),
        rates=rates,
    )


def dense_model(moe: Architecture) -> Architecture:
    """Return the model that the MoE would be upcycled from: the same without experts."""
    return replace(moe, num_moe_experts=None)


def _rates(dense: Architecture, max_lr: float | None, min_lr: float | None) -> Rates | None:
    if max_lr is None and min_lr is None:
        return (figure1.DENSE_MAX_LR, figure1.DENSE_MIN_LR) if dense == figure1.DENSE else None
    if max_lr is None or min_lr is None:
        given, missing = (
            ("dense_max_lr", "dense_min_lr") if min_lr is None else ("dense_min_lr", "dense_max_lr")
        )
        raise ConfigurationError(f"{given} is given without {missing}, expected both of them or neither")
    if min_lr > max_lr:
        raise ConfigurationError(f"dense_min_lr is {min_lr:g}, expected at most dense_max_lr ({max_lr:g})")
    return max_lr, min_lr


def _check(model: Architecture, cost: str, dense_tokens: int | None, schedule_tokens: int | None) -> None:
    if model.num_moe_experts is None:
        raise ConfigurationError(
            "model has no num_moe_experts, expected the MoE: its dense model follows from it"
        )
    if cost not in COSTS:
        raise ConfigurationError(f"cost is {cost!r}, expected {' or '.join(COSTS)}")
    if schedule_tokens is not None and (dense_tokens is None or schedule_tokens < dense_tokens):
        raise ConfigurationError(
            f"dense_schedule_tokens is {schedule_tokens}, expected at least dense_tokens ({dense_tokens})"
        )
