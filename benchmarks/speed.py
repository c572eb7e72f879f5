"""The time that commands take before they do anything heavy: python benchmarks/speed.py > benchmarks/speed.md

Ratios of processor time, each the smallest of several runs: they hold on other machines, and on busy ones.
"""

import argparse
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from nemo_skymoe.architecture import SKYWORK_MOE_146B
from nemo_skymoe.pipeline import plan
from nemo_skymoe.pipeline.hardware import A800_80G
from nemo_skymoe.pipeline.planner import best_layout
from nemo_skymoe.pipeline.problem import PipelineProblem
from nemo_skymoe.pipeline.simulator import simulated_durations
from nemo_skymoe.pipeline.task_graph import task_graph

RUNS = 7
SKYMOE = str(Path(sys.executable).with_name("skymoe"))
REPORT = shlex.split(
    "--model skywork-moe-146b --hardware A800-80G --num-gpus 1536 --tp 4 --ep 4 --pp 12 --seq-length 8192"
    " --global-batch-size 2048 --capacity-factor 1.25"
)
PAGE = """\
# What commands cost before they do anything heavy

`python benchmarks/speed.py > benchmarks/speed.md`

The tables have ratios of processor time, user and system. Each is the smallest of {runs} runs. No test asserts a time. Tests in
`tests/test_cli.py`, `tests/commands/` and `tests/pipeline/` ask what these commands import, and how much work they do.

## Commands, against a Python that starts and ends

| command | times |
|---|---|
{commands}

`import torch` is there for comparison: commands that do not need it do not wait for it.

## The planner and its simulator: 146B, 12 stages

| work | times |
|---|---|
{work}
"""


def main() -> None:
    """Print the page."""
    python = child(sys.executable, "-c", "pass")
    commands = {
        "`python -c 'import torch'`": child(sys.executable, "-c", "import torch"),
        "`skymoe --help`": child(SKYMOE, "--help"),
        "`skymoe doctor`": child(SKYMOE, "doctor"),
        "`skymoe plan`, the report's run": child(SKYMOE, "plan", *REPORT),
    }
    rows = "\n".join(f"| {name} | {seconds / python:.1f} |" for name, seconds in commands.items())
    print(PAGE.format(runs=RUNS, commands=rows, work="\n".join(work())), end="")


def work() -> list[str]:
    """Measure the parts of planning against one simulated step."""
    made = {micro_batches: problem(micro_batches) for micro_batches in (64, 256)}
    one, many = (
        own(lambda layouts=layouts: simulated_durations(made[256], *times(layouts)), 20)
        for layouts in (1, 32)
    )
    graphs = {m: own(lambda m=m: task_graph.__wrapped__(12, 1, m)) for m in made}
    plans = {m: own(lambda m=m: best_layout(made[m])) for m in made}
    return [
        f"| 32 layouts simulated together, over one, 256 micro-batches | {many / one:.1f} |",
        f"| the graph of a step, 256 micro-batches over 64 | {graphs[256] / graphs[64]:.1f} |",
        f"| the best layout, 256 micro-batches over 64 | {plans[256] / plans[64]:.1f} |",
        f"| the best layout over one simulated step, 256 micro-batches | {plans[256] / one:.0f} |",
    ]


def problem(micro_batches: int) -> PipelineProblem:
    """The report's run with so many micro-batches."""
    return plan(
        SKYWORK_MOE_146B, A800_80G, num_gpus=1536, tensor_parallel=4, expert_parallel=4, pipeline_parallel=12,
        seq_length=8192, global_batch_size=32 * micro_batches, capacity_factor=1.25,
    ).solution.problem  # fmt: skip


def times(layouts: int) -> tuple[np.ndarray, np.ndarray]:
    """Any times of 12 chunks."""
    forward = np.random.default_rng(0).uniform(1, 2, (layouts, 12))
    return forward, 2 * forward


def child(*command: str) -> float:
    """Processor seconds of a command."""

    def once() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    return min(once() for _ in range(RUNS))


def own(function: Callable[[], object], repeat: int = 1) -> float:
    """Processor seconds of a function here."""

    def once() -> float:
        before = time.process_time()
        for _ in range(repeat):
            function()
        return (time.process_time() - before) / repeat

    return min(once() for _ in range(RUNS))


if __name__ == "__main__":
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    main()
