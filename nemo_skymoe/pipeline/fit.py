"""Fit the two constants of `efficiency.Efficiency` to the two figures of one published run."""

from dataclasses import dataclass, replace
from itertools import accumulate

from nemo_skymoe.architecture import SKYWORK_13B, Architecture
from nemo_skymoe.pipeline.cost import CostModel
from nemo_skymoe.pipeline.efficiency import Efficiency
from nemo_skymoe.pipeline.hardware import A800_80G, Hardware
from nemo_skymoe.pipeline.layout import Layout
from nemo_skymoe.pipeline.simulator import simulate
from nemo_skymoe.pipeline.training import Training


@dataclass(frozen=True)
class PublishedRun:
    """A configuration without recomputation, and its measured figures."""

    model: Architecture
    hardware: Hardware
    training: Training
    layers: tuple[int, ...]
    """Number of layers of every stage."""
    tokens_per_gpu_per_second: float
    memory: float
    """Bytes on the fullest GPU. A published "GB" is taken as 1e9 bytes."""


SKYWORK_13B_RUN = PublishedRun(
    SKYWORK_13B,
    A800_80G,
    Training(
        pipeline_parallel=2,
        data_parallel=256,
        seq_length=4096,
        global_batch_size=4096,
        overlap_grad_reduce=False,
    ),
    layers=(26, 26),
    tokens_per_gpu_per_second=1873,
    memory=77.1e9,
)
"""Skywork-13B on 512 A800-80G, from arXiv 2310.19341, section 3.5 and Table 10. The paper does not mention overlapped
gradient reduction, so it is not assumed."""


def predict(run: PublishedRun, efficiency: Efficiency) -> tuple[float, float]:
    """Return the tokens per GPU and second, and the bytes on the fullest GPU, of this configuration."""
    problem = CostModel(run.model, run.training, run.hardware, efficiency).problem(run.hardware.memory)
    blocks = [layers + (stage == 0) for stage, layers in enumerate(run.layers)]
    cuts = (0, *accumulate(blocks[:-1]), len(problem.blocks))
    layout = Layout(problem, cuts, (0,) * len(run.layers))
    tokens = run.training.global_batch_size * run.training.seq_length
    seconds = simulate(layout).step_time
    return tokens / seconds / run.training.num_gpus, max(layout.memory) + efficiency.memory_overhead


def fit_efficiency(run: PublishedRun = SKYWORK_13B_RUN) -> Efficiency:
    """Return the constants with which the model gives the run's two figures. `links` is not fitted.

    The bisection is over `compute`, between 0 and 1 to 1e-9; memory does not depend on it.
    """
    start = Efficiency(memory_overhead=0.0)
    low, high = 0.0, 1.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        speed, _ = predict(run, replace(start, compute=middle))
        low, high = (middle, high) if speed < run.tokens_per_gpu_per_second else (low, middle)
    _, counted = predict(run, replace(start, compute=high))
    return replace(start, compute=high, memory_overhead=run.memory - counted)
