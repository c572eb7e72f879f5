"""Format an advice for `skymoe advise`, as text and as plain values."""

from dataclasses import asdict
from typing import Any

from nemo_skymoe.advice import figure1, rule
from nemo_skymoe.advice.advising import Advice, Measure, dense_model
from nemo_skymoe.advice.cost import TrainingCost
from nemo_skymoe.advice.reasons import evidence, reasons


def as_text(advice: Advice) -> str:
    """Return answer, reasons, costs, learning rates and evidence as text."""
    rates = [f"  {schedule.start.name}: {schedule}" for schedule in advice.schedules]
    parts = [
        [f"{advice.answer}, {advice.cost} cost"],
        reasons(advice),
        [""],
        _costs(advice),
        ["", _rates(advice)],
        rates,
        ["", "evidence:"],
        [f"  {line}" for line in evidence(advice)],
    ]
    return "\n".join(line for part in parts for line in part)


def to_dict(advice: Advice) -> dict[str, Any]:
    """Return the advice as plain values. FLOPs are those of the model, and GPU-hours are predicted."""
    measures = [
        {**asdict(measure), "ratio": float(measure.ratio), "answer": measure.answer}
        for measure in advice.measures
    ]
    return {
        "answer": advice.answer,
        "cost": advice.cost,
        "reasons": reasons(advice),
        "dense": None if advice.dense is None else _cost(advice.dense),
        "moe": _cost(advice.moe),
        "measures": measures,
        "upcycle_below": float(rule.UPCYCLE_BELOW),
        "scratch_from": float(rule.SCRATCH_FROM),
        "activated_parameters_ratio": _activated(advice),
        "report": {"gpu_hours": rule.REPORT_GPU_HOURS, "activated_parameters": rule.REPORT_ACTIVATED},
        "same_cost_tokens": advice.same_cost_tokens,
        "schedules": [
            {
                "start": schedule.start.name,
                "shape": schedule.start.shape,
                "peak": schedule.peak,
                "max_lr": schedule.max_lr,
                "min_lr": schedule.min_lr,
            }
            for schedule in advice.schedules
        ],
        "figure_1": [asdict(start) for start in figure1.STARTS],
        "evidence": evidence(advice),
    }


def _rates(advice: Advice) -> str:
    if advice.rates is None:
        return (
            "learning rate, as proportions: the report gives rates for its 0.3B model alone, which say nothing of this size;"
            " --dense-max-lr and --dense-min-lr give the dense model's own:"
        )
    return "learning rate, for a dense model from {:g} to {:g}:".format(*advice.rates)


def _cost(cost: TrainingCost) -> dict[str, Any]:
    training = cost.plan.training
    return {
        "tokens": cost.tokens,
        "flops": cost.flops,
        "gpu_hours": cost.gpu_hours,
        "tokens_per_gpu_per_second": cost.plan.tokens_per_gpu_per_second,
        "tensor_parallel": training.tensor_parallel,
        "expert_parallel": training.expert_parallel,
        "pipeline_parallel": training.pipeline_parallel,
        "data_parallel": training.data_parallel,
    }


def _activated(advice: Advice) -> float:
    """Return the ratio of activated parameters without embedding and output layer, as the report's 1.7 is counted."""
    moe, dense = advice.model, dense_model(advice.model)
    return (moe.activated_parameters - moe.embedding_parameters) / (
        dense.activated_parameters - dense.embedding_parameters
    )


def _costs(advice: Advice) -> list[str]:
    rows = [("", "dense", "MoE", "MoE / dense", "verdict")]
    if advice.dense is None:
        rows = [
            ("", "MoE"),
            ("GPU-hours, predicted", f"{advice.moe.gpu_hours:,.0f}"),
            ("FLOPs", f"{advice.moe.flops:.3g}"),
        ]
    rows += [_row(measure, advice.cost == "sunk") for measure in advice.measures]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    table = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]  # fmt: skip
    return [
        *table,
        f"activated parameters: {_activated(advice):.2f} times the dense model's; the report's factors, of its own model:"
        f" {rule.REPORT_ACTIVATED} of them, {rule.REPORT_GPU_HOURS} of GPU-hours.",
        *_layouts(advice),
    ]


def _row(measure: Measure, by_ratio: bool) -> tuple[str, str, str, str, str]:
    numbers = [f"{value:.3g}" if value >= 1e9 else f"{value:,.0f}" for value in (measure.dense, measure.moe)]
    chosen = f"{measure.answer}{' <- decides' if measure.decides and by_ratio else ''}"
    return measure.name, numbers[0], numbers[1], f"{float(measure.ratio):.3g}", chosen


def _layouts(advice: Advice) -> list[str]:
    lines = ["GPU-hours are predicted by `skymoe plan`'s model, not measured, at the fastest sizes that fit:"]
    for name, cost in (("dense", advice.dense), ("MoE", advice.moe)):
        if cost is not None:
            how = cost.plan.training
            experts = f" EP {how.expert_parallel}" if name == "MoE" else ""
            lines.append(
                f"  {name}: TP {how.tensor_parallel}{experts} PP {how.pipeline_parallel} DP {how.data_parallel},"
                f" {cost.plan.tokens_per_gpu_per_second:,.0f} tokens/GPU/s on {how.num_gpus} {advice.cluster.hardware.name}"
            )
    return lines
