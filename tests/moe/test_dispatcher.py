"""The EDP dispatchers on crafted routing, with experts that only scale: y_t = sum_e p_te * s_e * x_t."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import apply_router_token_dropping
from torch import Tensor, distributed

from nemo_skymoe.moe.permutation import by_capacity, by_expert, true_positions
from nemo_skymoe.ranks import run_ranks
from tests.cases import every
from tests.moe.edp_crafted import (
    EXPERTS,
    HIDDEN,
    PADDED,
    TOKENS,
    TOPK,
    config_for,
    dispatch_and_combine,
    dispatcher_for,
    start,
    top_weights,
)

DISPATCHERS = ("replicated", "allgather", "alltoall")
Routing = Callable[[Tensor], Tensor]


def random_routing(scores_TE: Tensor) -> Tensor:
    return top_weights(scores_TE)


def one_expert(scores_TE: Tensor) -> Tensor:
    """All tokens to expert 5 alone: every other rank's experts get none."""
    return torch.zeros_like(scores_TE).index_fill(1, torch.tensor([5]), 1.0) * scores_TE.exp()


def first_experts(scores_TE: Tensor) -> Tensor:
    """All tokens to experts 0, 1 and 2, more than a rank of four has."""
    mask = torch.zeros_like(scores_TE)
    mask[:, :TOPK] = 1.0
    return (scores_TE.exp() * mask) / (scores_TE.exp() * mask).sum(dim=1, keepdim=True)


def nobody(scores_TE: Tensor) -> Tensor:
    """Every assignment dropped."""
    return torch.zeros_like(scores_TE) * scores_TE


def dropped(scores_TE: Tensor) -> Tensor:
    weights = top_weights(scores_TE)
    return apply_router_token_dropping(weights, weights != 0, TOPK, 1.0)[0]


ROUTINGS: dict[str, Routing] = {
    f.__name__: f for f in (random_routing, one_expert, first_experts, nobody, dropped)
}


def errors_against_dense(n: int, cases: list[tuple[str, str, dict[str, Any]]]) -> list[dict[str, float]]:
    """Of every case the largest difference of outputs and gradients from the dense formula."""
    start(n)
    return [error_against_dense(n, name, ROUTINGS[routing], options) for name, routing, options in cases]


def error_against_dense(n: int, name: str, routing: Routing, options: dict[str, Any]) -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)
    whole = [
        torch.randn(TOKENS, width, generator=generator, dtype=torch.float64) for width in (HIDDEN, EXPERTS)
    ]
    target = torch.randn(TOKENS, HIDDEN, generator=generator, dtype=torch.float64)
    split = name != "replicated"
    mine = slice(None)
    if split:
        each = TOKENS // n
        mine = slice(distributed.get_rank() * each, (distributed.get_rank() + 1) * each)
    hidden, scores = (part[mine].clone().requires_grad_() for part in whole)
    output = dispatch_and_combine(dispatcher_for(config_for(name, n, **options)), hidden, routing(scores))
    (output * target[mine]).sum().backward()
    dense = [part.clone().requires_grad_() for part in whole]
    scales = torch.arange(1.0, EXPERTS + 1, dtype=torch.float64)
    pieces = dense[1].chunk(n) if split else [dense[1]]
    weights = torch.cat([routing(piece) for piece in pieces])
    expected = dense[0] * (weights @ scales).unsqueeze(-1)
    (expected * target).sum().backward()
    pairs = {
        "output": (output, expected[mine]),
        "hidden gradient": (hidden.grad, dense[0].grad[mine]),
        "score gradient": (scores.grad, dense[1].grad[mine]),
    }
    return {what: (found - wanted).abs().max().item() for what, (found, wanted) in pairs.items()}


CASES = [(name, routing, {}) for name in DISPATCHERS for routing in ROUTINGS]
CASES += [(name, "dropped", PADDED) for name in DISPATCHERS]


@pytest.fixture(scope="module")
def dense_errors() -> dict[int, list[dict[str, float]]]:
    return {n: run_ranks(all_errors, n, n) for n in (1, 2, 4)}


def all_errors(n: int) -> list[dict[str, float]]:
    return errors_against_dense(n, CASES)


@every("n", (1, 2, 4))
@every("index", range(len(CASES)), ids=["-".join((c[0], c[1], "padded" if c[2] else "")) for c in CASES])
def test_against_the_dense_formula(dense_errors: dict, n: int, index: int):
    for rank in dense_errors[n]:
        assert {what: error for what, error in rank[index].items() if not error < 1e-12} == {}


def hidden_dtypes_on_the_wire(name: str) -> tuple[torch.dtype, dict[str, set[torch.dtype]]]:
    """A bfloat16 model with float32 weights: the output's dtype, and what wide tensors were sent in."""
    start(2)
    sent: dict[str, set[torch.dtype]] = {}
    for function in ("all_reduce", "all_to_all_single", "all_gather_single", "reduce_scatter_single"):
        setattr(distributed, function, recording(sent, function, getattr(distributed, function)))
    weights = torch.rand(TOKENS, EXPERTS).topk(TOPK, dim=1)
    weights = torch.zeros(TOKENS, EXPERTS).scatter(1, weights.indices, 1 / 3).requires_grad_()
    if name == "replicated":
        distributed.broadcast(weights.data, 0)
    hidden = torch.randn(TOKENS, HIDDEN).bfloat16().requires_grad_()
    output = dispatch_and_combine(dispatcher_for(config_for(name, 2, torch.bfloat16)), hidden, weights)
    output.float().sum().backward()
    assert hidden.grad is not None and hidden.grad.dtype == torch.bfloat16
    return output.dtype, sent


def recording(sent: dict[str, set[torch.dtype]], name: str, function: Any) -> Any:
    def record(*args: Any, **kwargs: Any) -> Any:
        if args[0].dim() == 2 and args[0].shape[1] == HIDDEN and args[0].is_floating_point():
            sent.setdefault(name, set()).add(args[0].dtype)
        return function(*args, **kwargs)

    return record


@every(
    ("name", "collectives"),
    [
        ("replicated", {"all_reduce"}),
        ("allgather", {"all_gather_single", "reduce_scatter_single"}),
        ("alltoall", {"all_to_all_single"}),
    ],
)
def test_hidden_states_travel_in_the_models_dtype(name: str, collectives: set[str]):
    for dtype, sent in run_ranks(hidden_dtypes_on_the_wire, 2, name):
        assert dtype == torch.bfloat16
        assert set(sent) == collectives
        assert set().union(*sent.values()) == {torch.bfloat16}


def test_positions_are_found_without_being_counted():
    mask = torch.tensor([False, True, True, False, False, True])
    assert true_positions(mask, 3).tolist() == [1, 2, 5]
    assert true_positions(torch.zeros(4, dtype=torch.bool), 0).tolist() == []


def test_rows_keep_their_order_within_an_expert():
    weights = torch.tensor([[0.5, 0.0], [0.0, 1.0], [0.25, 0.75]])
    permutation = by_expert(weights)
    assert permutation.rows_P.tolist() == [0, 2, 1, 2]
    assert permutation.tokens_per_expert.tolist() == [2, 2]
    assert permutation.select(weights).tolist() == [0.5, 0.25, 1.0, 0.75]
    assert (
        permutation.unpermute(permutation.permute(torch.eye(3))).tolist()
        == torch.diag(torch.tensor([1.0, 1.0, 2.0])).tolist()
    )


def test_a_weight_that_is_not_a_number_is_not_swallowed():
    weights = torch.tensor([[float("nan"), 0.0]])
    assert by_expert(weights).select(weights).isnan().all()


def test_padding_fills_every_segments_places_with_each_weight_once():
    weights = torch.zeros(8, 2)
    weights[[0, 5, 6], [0, 0, 1]] = 1.0
    permutation = by_capacity(weights, capacity=2, segments=2)
    selected = permutation.select(weights).view(2, 2, 2)  # expert, segment, place
    assert selected.sum(dim=-1).tolist() == [[1.0, 1.0], [0.0, 1.0]]
    rows = permutation.rows_P.view(2, 2, 2)
    assert (rows[:, 0] < 4).all() and (rows[:, 1] >= 4).all()
    assert permutation.tokens_per_expert.tolist() == [4, 4]
