"""Print a plan as `skymoe plan` does."""

from rich.console import Console
from rich.table import Table

from nemo_skymoe.pipeline.flops import FORMULA
from nemo_skymoe.pipeline.plans import Plan, StagePlan

_INTERLEAVED = [
    "Interleaved: the layout is the best that heuristics found, and transfers count as overlapped"
    " (overlap_p2p_comm=True)."
]


def print_plan(plan: Plan) -> None:
    """Print a table of the stages, then the layout and the predictions for a step."""
    console = Console(highlight=False)
    console.print(_stages(plan))
    console.print(_summary(plan), soft_wrap=True)


def _stages(plan: Plan) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in (
        "stage",
        "layers",
        "",
        "recompute",
        "free",
        "time ms",
        "slack ms",
        "memory GB",
        "left GB",
    ):
        table.add_column(heading, justify="left" if not heading else "right")
    for stage in plan.stages:
        table.add_row(
            str(stage.stage),
            "+".join(map(str, stage.layers)),
            _ends(stage),
            "+".join(map(str, stage.recomputed)),
            str(stage.free_recompute),
            f"{stage.time * 1e3:.1f}",
            f"{stage.slack * 1e3:.1f}",
            f"{stage.memory / 1e9:.1f}",
            f"{stage.memory_slack / 1e9:.1f}",
        )
    return table


def _ends(stage: StagePlan) -> str:
    return " ".join(["embedding"] * stage.embedding + ["head"] * stage.head)


def _summary(plan: Plan) -> str:
    training, tail = plan.training, plan.solution.problem.tail
    lines = [
        "",
        f"layout      {plan.layout}",
        f"step        {plan.step_time:.3f} s with {training.micro_batches} micro-batches on {training.num_gpus}"
        f" {plan.hardware.name}, {tail:.3f} s of it gradient reduction; bubble {plan.bubble:.1%}",
        f"throughput  {plan.tokens_per_gpu_per_second:.0f} tokens/GPU/s",
        _mfu(plan),
        "free: layers that could be recomputed in the slack of the steady state; they are not, it would cost time in"
        " warm-up.",
        *_INTERLEAVED[: training.virtual_pipeline > 1],
        "Predicted by a cost model with two constants fitted to one published run, not measured.",
    ]
    return "\n".join(lines)


def _mfu(plan: Plan) -> str:
    peak = f"peak {plan.hardware.peak_flops / 1e12:.1f} TFLOP/s"
    mfu = f"MFU         {plan.mfu:.1%}, of {peak}; FLOPs a token = {FORMULA}"
    if plan.padded_mfu == plan.mfu:
        return mfu
    return f"{mfu}\n            {plan.padded_mfu:.1%} with the experts' padded capacity: experts x capacity_factor ({plan.training.capacity_factor:g})"
