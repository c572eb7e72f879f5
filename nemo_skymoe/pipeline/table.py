"""Print a plan as `skymoe plan` does."""

from rich.console import Console
from rich.table import Table

from nemo_skymoe.pipeline.flops import FORMULA
from nemo_skymoe.pipeline.plans import Plan, StagePlan
from nemo_skymoe.pipeline.size_search import Found

_SIZES = {
    "TP": "tensor_parallel",
    "CP": "context_parallel",
    "EP": "expert_parallel",
    "PP": "pipeline_parallel",
    "VPP": "virtual_pipeline",
    "MBS": "micro_batch_size",
}
_INTERLEAVED = [
    "Interleaved: the layout is the best that heuristics found, and transfers count as overlapped"
    " (overlap_p2p_comm=True)."
]


def print_plan(plan: Plan) -> None:
    """Print a table of the stages, then the layout and the predictions for a step."""
    console = Console(highlight=False)
    console.print(_stages(plan))
    console.print(_summary(plan), soft_wrap=True)


def print_found(found: Found) -> None:
    """Print the best plans of a search as a table, and the options that plan the first of them again."""
    console = Console(highlight=False)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in (*_SIZES, "recompute", "step s", "tokens/s", "MFU", "memory GB"):
        table.add_column(heading, justify="right")
    for plan in found.plans:
        table.add_row(
            *(str(getattr(plan.training, size)) for size in _SIZES.values()),
            f"{sum(sum(stage.recomputed) for stage in plan.stages) / plan.model.num_layers:.0%}",
            f"{plan.step_time:.3f}",
            f"{plan.tokens_per_gpu_per_second:.0f}",
            f"{plan.mfu:.1%}",
            f"{max(stage.memory for stage in plan.stages) / 1e9:.1f}",
        )
    console.print(table)
    best = found.plans[0].training
    chosen = " ".join(
        f"--{name.lower()} {getattr(best, size)}" for name, size in _SIZES.items() if name != "MBS"
    )
    lines = [
        "",
        f"the first   {chosen} --micro-batch-size {best.micro_batch_size}",
        f"search      {found.planned} layouts were planned of {found.combinations} that the sizes allow: those with the"
        " shortest estimates.",
        "MBS: sequences of a micro-batch. recompute: share of the layers. tokens/s: of a GPU. memory: the fullest stage.",
        "Predicted by a cost model with two constants fitted to one published run, not measured.",
    ]
    console.print("\n".join(lines), soft_wrap=True)


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
