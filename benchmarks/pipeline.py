"""Pipeline layouts compared: python benchmarks/pipeline.py > benchmarks/pipeline.md

Also draws docs/pipeline.png: three layouts of Figure 6 on one scale of time.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from nemo_skymoe.architecture import SKYWORK_13B, SKYWORK_MOE_146B
from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.pipeline import plan
from nemo_skymoe.pipeline.drawing import draw_schedule
from nemo_skymoe.pipeline.hardware import A800_80G
from nemo_skymoe.pipeline.plans import Plan

PICTURE = Path(__file__).parents[1] / "docs" / "pipeline.png"
PICTURE_MICRO_BATCHES = 16
COMMAND = "python benchmarks/pipeline.py > benchmarks/pipeline.md"
FIGURE_6 = """
## Figure 6: 24 layers

The report compares [6, 6, 6, 6] with [5, 5, 5, 5, 4], that is, four stages with five. On 8 data-parallel ranks these are
32 and 40 GPUs. The report does not say which layers it uses; here they are those of Skywork-13B. Final norm, output layer and
loss take as long as {head:.2f} layers, which is why the last of five stages has one layer less. Tokens per GPU and second are
the fair measure across numbers of GPUs. Layouts with the same number of stages can be compared directly.

| micro-batches | layout | GPUs | bubble | step, s | tokens/GPU/s | against [6, 6, 6, 6] |
|---|---|---|---|---|---|---|"""
REPORT = """
## The report's 146B model: 52 layers on 12 stages

1536 A800-80G, TP 4, EDP 4, DP 32, sequence 8192, 2048 sequences a step (assumed), experts in balance and
not padded: the run of the recipe `skywork_moe_146b`.

Every layout but the plan recomputes the first layers of a stage until the stage fits:

- **even** has four layers on every stage, and one more on four stages: the first ones, the last ones, or every third.
- **greedy** puts each block on the stage whose share of the total time contains the block's middle.
- **without a layout** is what Megatron offers with `num_layers_in_first_pipeline_stage` and
  `num_layers_in_last_pipeline_stage`: the stages between them are equal. 52 layers on 12 stages need one of these options,
  or a layout.
- **recipe** is the layout that `skywork_moe_146b` had by hand.

| micro-batch | layout | layers | recomputed | fullest GPU, GB | bubble | step, s | tokens/GPU/s | time against the plan |
|---|---|---|---|---|---|---|---|---|"""


def main() -> None:
    """Print both comparisons."""
    print(
        f"# Pipeline layouts\n\n`{COMMAND}`\n\nAll figures are predicted by the cost model and simulated. None is measured."
    )
    print(FIGURE_6.format(head=_head_in_layers()))
    for micro_batches in (4, 8, 16, 32, 64, 256):
        print("\n".join(_figure_6(micro_batches)))
    _draw_figure_6()
    print(REPORT)
    for micro_batch in (1, 2):
        print("\n".join(_report(micro_batch)))


def figure_6(stages: int, micro_batches: int, layers: Sequence[int] | None = None) -> Plan:
    """24 layers on `stages` stages and 8 data-parallel ranks."""
    return plan(
        replace(SKYWORK_13B, num_layers=24),
        A800_80G,
        pipeline_parallel=stages,
        data_parallel=8,
        seq_length=4096,
        global_batch_size=8 * micro_batches,
        layers=layers,
        overlap_grad_reduce=False,
    )


def _head_in_layers() -> float:
    blocks = figure_6(4, 8).solution.problem.blocks
    return blocks[-1].time / blocks[1].time


def _figure_6(micro_batches: int) -> Iterator[str]:
    even = figure_6(4, micro_batches, [6, 6, 6, 6])
    for name, made in (
        ("", even),
        ("best of four stages: ", figure_6(4, micro_batches)),
        ("the report's: ", figure_6(5, micro_batches, [5, 5, 5, 5, 4])),
        ("best of five stages: ", figure_6(5, micro_batches)),
    ):
        gain = made.tokens_per_gpu_per_second / even.tokens_per_gpu_per_second - 1
        yield (
            f"| {micro_batches} | {name}{_layers(made)} | {made.training.num_gpus} | {made.bubble:.1%} |"
            f" {made.step_time:.3f} | {made.tokens_per_gpu_per_second:.0f} | {gain:+.1%} |"
        )


def _draw_figure_6() -> None:
    """The pictures below each other, each cut off where the longest step ends."""
    import numpy as np
    from matplotlib import image
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    plans = {
        "Figure 6 (a)": figure_6(4, PICTURE_MICRO_BATCHES, [6, 6, 6, 6]),
        "The best on as many GPUs": figure_6(4, PICTURE_MICRO_BATCHES),
        "Figure 6 (b), on a quarter more GPUs": figure_6(5, PICTURE_MICRO_BATCHES, [5, 5, 5, 5, 4]),
    }
    longest = max(made.simulation.duration for made in plans.values())
    pictures = []
    for name, made in plans.items():
        figure = draw_schedule(
            made.simulation,
            f"{name}: {_layers(made)}, bubble {made.bubble:.1%}, {made.tokens_per_gpu_per_second:.0f} tokens/GPU/s",
        )
        figure.axes[0].set_xlim(0, longest)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        pictures.append(np.asarray(canvas.buffer_rgba()))
    image.imsave(PICTURE, np.vstack(pictures)[..., :3].copy())


def _report(micro_batch: int) -> Iterator[str]:
    options: dict[str, Any] = {
        "num_gpus": 1536,
        "tensor_parallel": 4,
        "expert_parallel": 4,
        "pipeline_parallel": 12,
        "seq_length": 8192,
        "micro_batch_size": micro_batch,
        "global_batch_size": 2048,
        "capacity_factor": 1.25,
    }
    planned = plan(SKYWORK_MOE_146B, A800_80G, **options)
    yield _report_row(micro_batch, "**planned**", planned, planned)
    for name, layers in (
        ("recipe", [4, 5, 5, 5, 5, *[4] * 7]),
        ("even, first", [*[5] * 4, *[4] * 8]),
        ("even, last", [*[4] * 8, *[5] * 4]),
        ("even, every third", [5, 4, 4] * 4),
        ("greedy", _greedy(planned)),
        ("without a layout", [6, *[4] * 10, 6]),
        ("without a layout", [1, *[5] * 10, 1]),
    ):
        try:
            made = plan(SKYWORK_MOE_146B, A800_80G, layers=layers, **options)
        except ConfigurationError as reason:
            yield f"| {micro_batch} | {name} | {layers} | {reason} |"
        else:
            yield _report_row(micro_batch, name, made, planned)


def _report_row(micro_batch: int, name: str, made: Plan, planned: Plan) -> str:
    memory = max(stage.memory for stage in made.stages) / 1e9
    recomputed = [sum(stage.recomputed) for stage in made.stages]
    return (
        f"| {micro_batch} | {name} | {_layers(made)} | {recomputed if any(recomputed) else 'none'} | {memory:.1f} |"
        f" {made.bubble:.1%} | {made.step_time:.2f} | {made.tokens_per_gpu_per_second:.0f} |"
        f" {made.step_time / planned.step_time - 1:+.1%} |"
    )


def _layers(made: Plan) -> str:
    return str([sum(stage.layers) for stage in made.stages])


def _greedy(made: Plan) -> list[int]:
    """Layers of every stage when each block goes to the stage whose share of the total time its middle falls into."""
    blocks, stages = made.solution.problem.blocks, len(made.stages)
    ends = list(accumulate(block.time for block in blocks))
    layers = [0] * stages
    for block, end in zip(blocks, ends, strict=True):
        layers[int((end - block.time / 2) / ends[-1] * stages)] += block.kind == "layer"
    return layers


if __name__ == "__main__":
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    main()
