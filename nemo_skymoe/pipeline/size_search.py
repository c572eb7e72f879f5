"""Search the parallel sizes and the micro-batch of a training for the shortest predicted steps.

Every combination of sizes gets an estimate of its step by a formula, and those with the shortest estimates are planned:
their layout is looked for and simulated. The search ends when the estimates of all others are longer than the best steps
by a margin. It is a search by estimates, not a proof.
"""

import bisect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate, product
from typing import Any

from nemo_skymoe.architecture import Architecture
from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.pipeline.planning import Question, plan_of
from nemo_skymoe.pipeline.plans import Plan
from nemo_skymoe.pipeline.problem import PipelineProblem
from nemo_skymoe.pipeline.training import Training

MICRO_BATCHES = (1, 2, 4, 8)
MARGIN = 1.03
"""Estimates up to this multiple of the last of the best steps are planned."""
LARGEST_VIRTUAL = 4
"""Most virtual stages that are tried. Each adds transfers, and the gain is the smaller the more there are."""
LEAST_TOKENS = 1024
"""Tokens of a sequence that a context-parallel rank has at least. With fewer it waits for keys and values."""
SEARCHED = (
    "tensor_parallel",
    "context_parallel",
    "pipeline_parallel",
    "virtual_pipeline",
    "expert_parallel",
    "micro_batch_size",
)
_SUMMED = ("recompute", "weights", "activations", "checkpoint")


@dataclass(frozen=True)
class Found:
    """The best plans, the best one first, and how many combinations there were."""

    plans: tuple[Plan, ...]
    combinations: int
    """Combinations of sizes that the model, the batch and the GPUs allow."""
    planned: int
    """Combinations whose layout was looked for. The estimates of all others are longer, or they cannot fit."""


@dataclass(frozen=True)
class _Combination:
    training: Training
    problem: PipelineProblem
    estimate: float
    """Estimated seconds of a step, infinite if it does not fit."""


def search(
    question: Question,
    num_gpus: int,
    fixed: Mapping[str, Any],
    *,
    best: int = 10,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Found:
    """Return the plans with the shortest predicted steps on `num_gpus` GPUs.

    Args:
        question: The model, the hardware, and what does not vary.
        num_gpus: Number of all GPUs.
        fixed: Fields of `Training`. Those of `SEARCHED` that are missing are searched.
        best: Number of plans to return at most.
        progress: Called with the number of combinations that are settled, and of all.

    Raises:
        ConfigurationError: No combination of sizes is possible, or none fits in memory.
    """
    combinations = sorted(_combinations(question, num_gpus, fixed), key=lambda one: one.estimate)
    if not combinations:
        raise ConfigurationError(
            f"no layout of {num_gpus} GPUs is possible for this model, sequence and batch: expected a num_gpus and a"
            " global_batch_size that more sizes divide, or fewer given sizes"
        )
    found: list[Plan] = []
    planned = 0
    for done, one in enumerate(combinations):
        progress(done, len(combinations))
        if one.estimate == math.inf or (len(found) == best and one.estimate > MARGIN * found[-1].step_time):
            break
        planned += 1
        with suppress(ConfigurationError):  # it does not fit
            bisect.insort(
                found, plan_of(question, one.training, one.problem), key=lambda plan: plan.step_time
            )
        del found[best:]
    if not found:
        raise ConfigurationError(
            f"none of the {len(combinations)} possible layouts of {num_gpus} GPUs fits in {question.limit / 1e9:.1f} GB"
            " of each: expected a larger num_gpus or memory_limit"
        )
    return Found(tuple(found), len(combinations), planned)


def _combinations(question: Question, num_gpus: int, fixed: Mapping[str, Any]) -> Iterator[_Combination]:
    for sizes in _sizes(question, num_gpus, fixed):
        try:
            training = question.training({**fixed, **sizes}, num_gpus=num_gpus)
            problem = question.problem(training)
        except ConfigurationError:
            continue  # the sizes do not divide the model, the batch or the GPUs
        yield _Combination(training, problem, estimated_step(problem))


def _sizes(question: Question, num_gpus: int, fixed: Mapping[str, Any]) -> Iterator[dict[str, int]]:
    model, node = question.model, question.hardware.gpus_per_node
    choices = {
        "tensor_parallel": _powers_of_two(node),
        "context_parallel": _powers_of_two(max(1, fixed.get("seq_length", 1) // LEAST_TOKENS)),
        "pipeline_parallel": _divisors(num_gpus, model.num_layers + 2),
        "virtual_pipeline": range(1, LARGEST_VIRTUAL + 1),
        "expert_parallel": _divisors(model.num_moe_experts or 1),
        "micro_batch_size": MICRO_BATCHES,
    }
    given = {name: (fixed[name],) if name in fixed else values for name, values in choices.items()}
    for values in product(*given.values()):
        sizes = dict(zip(given, values, strict=True))
        if _is_worth_trying(model, sizes, fixed):
            yield sizes


def _is_worth_trying(model: Architecture, sizes: Mapping[str, int], fixed: Mapping[str, Any]) -> bool:
    """Return whether sizes are possible and not plainly worse than others: experts are spread at least as far as tensors."""
    stages, virtual = sizes["pipeline_parallel"], sizes["virtual_pipeline"]
    if virtual > 1 and (stages == 1 or stages * virtual > model.num_layers + 2):
        return False
    spread = not model.num_moe_experts or "expert_parallel" in fixed
    return spread or sizes["expert_parallel"] >= sizes["tensor_parallel"]


def estimated_step(problem: PipelineProblem) -> float:
    """Return the seconds of a step with even stages, infinite if even recomputing all layers cannot make them fit.

    A stage that is s stages before the last holds the activations of s + 1 micro-batches, and with V virtual stages those
    of (P - 1) / V more (Narayanan et al., arXiv 2104.04473, section 2.2). As many layers are recomputed as it takes to fit.
    The step has one idle time of (P - 1) / V micro-batches.
    """
    stages, virtual, batches = problem.stages, problem.virtual_stages, problem.micro_batches
    totals = {name: sum(getattr(block, name) for block in problem.blocks) / stages for name in _SUMMED}
    working = max(block.working for block in problem.blocks)
    room = problem.memory_limit - totals["weights"] - working
    ahead = (stages - 1) / virtual if virtual > 1 else 0.0
    shares = []
    for before_last in range(stages):
        held = min(batches, before_last + 1 + ahead)
        over, saved = (
            held * totals["activations"] - room,
            held * (totals["activations"] - totals["checkpoint"]),
        )
        shares.append(max(0.0, over / saved) if saved else float(over > 0))
    mean = sum(shares) / stages
    if mean > 1:
        return math.inf
    slowest = _slowest(problem) + mean * totals["recompute"]
    return (batches + (stages - 1) / virtual) * slowest + problem.tail


def _slowest(problem: PipelineProblem) -> float:
    """Return the seconds of the slowest stage if blocks, which cannot be split, are dealt out as evenly as possible."""
    ends = list(accumulate(block.time for block in problem.blocks))
    low, high = ends[-1] / problem.stages, ends[-1]
    while high - low > 0.001 * low:
        middle = (low + high) / 2
        low, high = (low, middle) if _stages_within(ends, middle) <= problem.stages else (middle, high)
    waits = 2 * problem.transfer if problem.virtual_stages == 1 and problem.stages > 1 else 0.0
    return high + waits


def _stages_within(ends: list[float], limit: float) -> int:
    """Count the stages that it takes if none is longer than `limit`; `ends` are sums of the blocks' times."""
    stages, done, first = 0, 0.0, 0
    while first < len(ends):
        following = bisect.bisect_right(ends, done + limit, lo=first)
        if following == first:
            return len(ends) + 1  # a single block is longer
        stages, done, first = stages + 1, ends[following - 1], following
    return stages


def _powers_of_two(most: int) -> list[int]:
    return [2**power for power in range(most.bit_length())]


def _divisors(number: int, most: int | None = None) -> list[int]:
    return [one for one in range(1, min(number, most or number) + 1) if number % one == 0]
