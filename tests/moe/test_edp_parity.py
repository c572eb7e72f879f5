"""EDP against TP = EP = 1: outputs and the gradient of every parameter, in float64, auxiliary and z-loss on.

With `moe_capacity_scope="rank"` the tokens dropped depend on the layout: there the reference drops within the
same slices of the sequence, as if each were a rank. With "edp" it is the plain model.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from nemo_skymoe.ranks import run_ranks
from tests.cases import every
from tests.moe import edp_worlds
from tests.moe.edp_compare import gradient_errors, logit_error
from tests.moe.edp_worlds import Case, Outcome

TOLERANCE = 1e-10
CAPACITY = 1.0
DISPATCHERS = ("replicated", "allgather", "alltoall")
CORRECTIONS = ("share_tokens", "share_weights", "exclude_replicas")


def cases_of(n: int) -> list[Case]:
    """Every dispatcher, dropless and with a capacity, with and without recomputation."""
    cases = [Case(n, name, capacity) for name in DISPATCHERS for capacity in (None, CAPACITY)]
    cases += [
        Case(n, name, capacity, recompute="full") for name in DISPATCHERS for capacity in (None, CAPACITY)
    ]
    cases += [Case(n, name, CAPACITY, recompute="moe") for name in DISPATCHERS]
    cases += [Case(n, name, CAPACITY, padded=True) for name in DISPATCHERS]
    cases += [Case(n, name, CAPACITY, "edp", padded) for name in DISPATCHERS[:2] for padded in (False, True)]
    cases += [Case(n, "allgather", CAPACITY, "edp", recompute="full")]
    cases += [Case(n, name, qwen=True) for name in DISPATCHERS]
    cases += [Case(n, name, aux_loss_form="square") for name in DISPATCHERS]
    return cases + overlapped(n)


def overlapped(n: int) -> list[Case]:
    """The same with each micro-batch exchanged in two halves."""
    cases = [
        Case(n, name, capacity, recompute=recompute, overlap=True)
        for name in DISPATCHERS
        for capacity in (None, CAPACITY)
        for recompute in (None, "full", "moe")
    ]
    cases += [Case(n, name, recompute="core_attn", overlap=True) for name in DISPATCHERS]
    cases += [Case(n, name, aux_loss_form="square", overlap=True) for name in DISPATCHERS]
    cases += [Case(n, name, CAPACITY, "edp", overlap=True) for name in DISPATCHERS[:2]]
    return cases + [
        Case(n, "alltoall", CAPACITY, padded=True, recompute=recompute, overlap=True)
        for recompute in (None, "full", "moe")
    ]


CASES = cases_of(2) + [
    Case(4, name, capacity, overlap=overlap)
    for name in DISPATCHERS
    for capacity in (None, CAPACITY)
    for overlap in (False, True)
]
ON_FOUR = [case for case in cases_of(4) if case not in CASES]
CONTEXT = [Case(2, name, capacity, cp=2) for name in DISPATCHERS for capacity in (None, CAPACITY)]
CONTEXT += [Case(2, name, cp=2, overlap=True) for name in DISPATCHERS]
MUTANTS = [Case(n, "replicated", mutation=correction) for n in (2, 4) for correction in CORRECTIONS]
SINGLE = [Case(n, name, dtype=torch.float32) for n in (2, 4) for name in DISPATCHERS]
Compare = Callable[[Case], tuple[list[Outcome], Outcome]]


@pytest.fixture(scope="module")
def compare() -> Compare:
    return comparison(CASES + CONTEXT + MUTANTS + SINGLE)


def comparison(cases: list[Case]) -> Compare:
    """A case's outcomes by rank, and its reference's; one launch per world size runs them all."""
    references = list({case.reference: None for case in cases})
    outcomes = {case: [outcome] for case, outcome in zip(references, launch(1, references)[0], strict=True)}
    for size in sorted({case.n * case.cp for case in cases}):
        world = [case for case in cases if case.n * case.cp == size]
        outcomes |= dict(zip(world, zip(*launch(size, world), strict=True), strict=True))
    return lambda case: (list(outcomes[case]), outcomes[case.reference][0])


def launch(size: int, cases: list[Case]) -> list[list[Outcome]]:
    return run_ranks(edp_worlds.run_cases, size, cases)


def each(cases: list[Case]) -> Callable[..., Any]:
    return every("case", cases, ids=lambda case: case.name)


@each(CASES + CONTEXT)
def test_outputs_and_every_gradient_are_those_of_one_rank(compare: Compare, case: Case):
    check_parity(compare, case)


def check_parity(compare: Compare, case: Case) -> None:
    outcomes, reference = compare(case)
    errors = gradient_errors(outcomes, reference)
    assert logit_error(outcomes, reference) <= TOLERANCE
    assert {name: error for name, error in errors.items() if not error <= TOLERANCE} == {}
    assert set(errors) == set(reference.gradients)
    assert all(abs(gradient).max() > 0 for gradient in reference.gradients.values())
    if case.capacity_factor is not None:
        assert reference.dropped >= 0.05
        if case.reference.slices == (1, 1):
            rates = [pytest.approx(reference.drop_rates, rel=1e-12)] * len(outcomes)
            assert [outcome.drop_rates for outcome in outcomes] == rates


@pytest.mark.long
def test_every_option_on_four_ranks() -> None:
    compare = comparison(ON_FOUR)

    @each(ON_FOUR)
    def parity(case: Case) -> None:
        check_parity(compare, case)

    parity()


@each(MUTANTS)
def test_without_a_correction_outputs_are_right_and_gradients_wrong(compare: Compare, case: Case):
    outcomes, reference = compare(case)
    worst = max(gradient_errors(outcomes, reference).values())
    print(f"\n{case.name}: largest |g - g1| / |g1| = {worst:.2g}")
    assert logit_error(outcomes, reference) <= TOLERANCE
    assert worst > 1e-2


@each(SINGLE)
def test_single_precision_differs_by_reduction_order(compare: Compare, case: Case):
    """The figure is for the reader; that it is above the tolerance is why the others run in float64."""
    outcomes, reference = compare(case)
    worst = max(gradient_errors(outcomes, reference).values())
    print(f"\n{case.name}: largest |g - g1| / |g1| = {worst:.2g}")
    assert worst > TOLERANCE
