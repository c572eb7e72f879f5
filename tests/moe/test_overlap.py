"""A micro-batch exchanged in two halves: the same numbers, both halves under way at once, and what is refused."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import apply_router_token_dropping
from torch import Tensor, distributed

from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.moe import expert_group
from nemo_skymoe.moe.dispatch_alltoall import AllToAllTokenDispatcher
from nemo_skymoe.moe.edp import check_overlap
from nemo_skymoe.ranks import run_ranks
from tests.cases import every
from tests.moe import edp_crafted
from tests.moe.edp_crafted import (
    EXPERTS,
    HIDDEN,
    PADDED,
    config_for,
    dispatch_and_combine,
    dispatcher_for,
    start,
)
from tests.moe.worlds import Layout, Training, groups, in_world, relative_errors

DISPATCHERS = ("replicated", "allgather", "alltoall")
TOKENS = (16, 5, 1)
"""Of a rank: halves of one size, of two sizes, and one without a token."""


def outcomes(n: int) -> list[tuple[str, list[Tensor], list[Tensor]]]:
    """Of each case its name, and output and gradients in one piece and in two."""
    start(n)
    found = []
    cases = [(name, {}, tokens) for name in DISPATCHERS for tokens in TOKENS]
    cases += [(name, {"moe_expert_capacity_factor": 1.0}, 16) for name in DISPATCHERS]
    cases += [("alltoall", PADDED, tokens) for tokens in TOKENS]
    cases += [
        (name, {"moe_expert_capacity_factor": 1.0, "moe_capacity_scope": "edp"}, 16)
        for name in DISPATCHERS[:2]
    ]
    for name, options, tokens in cases:
        pieces = [exchanged(n, name, tokens, edp_overlap=overlap, **options) for overlap in (False, True)]
        found.append((f"{name} {options} {tokens}", *pieces))
    return found


def exchanged(n: int, name: str, tokens: int, **options: Any) -> list[Tensor]:
    """Output and gradients of a rank's tokens."""
    generator = torch.Generator().manual_seed(0 if name == "replicated" else distributed.get_rank())
    hidden, scores, target = (
        torch.randn(tokens, width, generator=generator, dtype=torch.float64)
        for width in (HIDDEN, EXPERTS, HIDDEN)
    )
    weights = edp_crafted.top_weights(scores)
    if "moe_expert_capacity_factor" in options and options.get("moe_capacity_scope") != "edp":
        weights = apply_router_token_dropping(weights, weights != 0, 3, 1.0)[0]
    hidden.requires_grad_()
    weights.requires_grad_()
    dispatcher = dispatcher_for(
        config_for(name, n, **{"moe_router_telemetry": False, **NOT_ADAPTIVE, **options})
    )
    output = dispatch_and_combine(dispatcher, hidden, weights)
    (output * target).sum().backward()
    assert hidden.grad is not None and weights.grad is not None
    return [output.detach(), hidden.grad, weights.grad]


NOT_ADAPTIVE = {"moe_adaptive_aux_loss": False}


@every("n", (1, 2, 4))
def test_two_halves_are_equal_to_the_bit_where_sums_have_one_order(n: int) -> None:
    for rank in run_ranks(outcomes, n, n):
        assert len(rank) == 9 + 3 + 3 + 2
        for name, whole, halves in rank:
            assert whole[0].abs().max() > 0
            for one, two in zip(whole, halves, strict=True):
                # Over more than two ranks gloo adds in an order that depends on a row's place in what is reduced.
                bound = 0.0 if n <= 2 or name.startswith("alltoall") else 1e-14
                assert (one - two).norm() <= bound * one.norm(), name


class Watched(torch.autograd.Function):
    """Says when experts run, in both passes."""

    @staticmethod
    def forward(ctx, rows: Tensor, say: Callable[[str], None]) -> Tensor:
        ctx.say = say
        say("experts")
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        ctx.say("experts")
        return gradients[0], None


@contextmanager
def watched(events: list[str]) -> Iterator[None]:
    """Write down what is begun, what is waited for, and when experts run. Waiting names the turn of the beginning."""
    begin, wait, scale = (
        expert_group.ExpertGroup._begin,
        expert_group.Begun.wait,
        edp_crafted.scaled_by_experts,
    )
    turns: dict[int, int] = {}

    def beginning(self: Any, *args: Any) -> Any:
        begun = begin(self, *args)
        turns[id(begun)] = len(turns)
        events.append(f"begin {turns[id(begun)]}")
        kept.append(begun)
        return begun

    def waiting(self: Any) -> Tensor:
        if id(self) in turns:
            events.append(f"wait {turns[id(self)]}")
        return wait(self)

    def scaling(dispatcher: Any, rows: Tensor, *args: Any) -> Tensor:
        function: Any = Watched
        return scale(dispatcher, function.apply(rows, events.append), *args)

    kept: list[Any] = []  # so that no two have the same id
    with (
        mock.patch.object(expert_group.ExpertGroup, "_begin", beginning),
        mock.patch.object(expert_group.Begun, "wait", waiting),
        mock.patch.object(edp_crafted, "scaled_by_experts", scaling),
    ):
        yield


def order_of_events(name: str, overlap: bool) -> tuple[list[str], list[str]]:
    """Of the forward and the backward pass."""
    start(2)
    handles: list[bool] = []
    exchange = distributed.all_to_all_single

    def recorded(*args: Any, **kwargs: Any) -> Any:
        handles.append(kwargs["async_op"])
        return exchange(*args, **kwargs)

    dispatcher = dispatcher_for(config_for(name, 2, edp_overlap=overlap, **PADDED))
    weights = torch.rand(16, EXPERTS, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weights = edp_crafted.top_weights(weights)
    weights = apply_router_token_dropping(weights, weights != 0, 3, 1.0)[0].requires_grad_()
    hidden = torch.randn(16, HIDDEN, dtype=torch.float64, requires_grad=True)
    forward: list[str] = []
    backward: list[str] = []
    with mock.patch.object(distributed, "all_to_all_single", recorded):
        with watched(forward):
            output = dispatch_and_combine(dispatcher, hidden, weights)
            events = len(forward)
            output.sum().backward()
        forward, backward = forward[:events], forward[events:]
    assert all(handles) and len(handles) == (12 if overlap else 6)
    return forward, backward


def test_one_half_travels_while_the_experts_compute_the_other_in_both_passes() -> None:
    """Rows and weights of the first half are exchanges 0 and 1, of the second 2 and 3; 4 and 5 bring rows back."""
    ways = ["begin 0", "begin 1", "begin 2", "begin 3", "wait 0", "wait 1", "experts"]
    ways += ["begin 4", "wait 2", "wait 3", "experts", "begin 5", "wait 4", "wait 5"]
    back = ["begin 6", "begin 7", "wait 6", "experts", "begin 8", "begin 9", "wait 7", "experts"]
    back += ["begin 10", "begin 11"]
    for forward, backward in run_ranks(order_of_events, 2, "alltoall", True):
        assert forward == ways
        assert backward[: len(back)] == back
        assert sorted(backward[len(back) :]) == ["wait 10", "wait 11", "wait 8", "wait 9"]


def test_in_one_piece_nothing_travels_while_experts_compute() -> None:
    for forward, backward in run_ranks(order_of_events, 2, "alltoall", False):
        assert forward == ["begin 0", "begin 1", "wait 0", "wait 1", "experts", "begin 2", "wait 2"]
        assert backward[:3] == ["begin 3", "wait 3", "experts"]


SHARED = {"moe_shared_expert_intermediate_size": 24, "moe_z_loss_coeff": 0.3}


def gradients(layout: Layout, dispatcher: str, overlap: bool) -> dict[str, Tensor]:
    """Of two micro-batches with a shared expert."""
    options = {"edp_dispatcher": dispatcher, "edp_overlap": overlap, "moe_edp": True, **SHARED}
    with groups(layout):
        training = Training(layout, **options)
        training.run()
        return training.gradients()


def all_gradients(layouts: list[Layout], names: tuple[str, ...]) -> list[dict[str, Tensor]]:
    return [gradients(layout, name, True) for layout, name in zip(layouts, names, strict=True)]


def test_with_a_shared_expert_gradients_are_those_of_one_rank() -> None:
    layouts = [Layout(tp=2, ep=2, sp=name != "replicated") for name in DISPATCHERS]
    (one,) = run_ranks(in_world, 1, all_gradients, [Layout()], ("auto",))[0]
    plain = run_ranks(in_world, 1, gradients, Layout(), "auto", False)[0]
    assert {name: error for name, error in relative_errors(one, plain).items() if not error <= 1e-10} == {}
    for found in run_ranks(in_world, 2, all_gradients, layouts, DISPATCHERS)[0]:
        errors = relative_errors(found, plain)
        assert {name: error for name, error in errors.items() if not error <= 1e-10} == {}


class Waits(AllToAllTokenDispatcher):
    """Casts what it has sent, which may not have arrived."""

    def token_dispatch(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        rows, weights = super().token_dispatch(hidden_states.bfloat16(), probs)
        return rows.to(hidden_states.dtype), weights


def test_what_cannot_be_split_is_refused_by_name() -> None:
    with pytest.raises(
        ConfigurationError, match=r"edp_overlap is True, expected False with Waits: its token_dispatch"
    ):
        check_overlap(Waits)
    check_overlap(AllToAllTokenDispatcher)
    for name in ("replicated", "allgather"):
        with pytest.raises(
            ConfigurationError, match=r"edp_overlap=True .* moe_pad_expert_input_to_capacity=False"
        ):
            config_for(name, 2, edp_overlap=True, **PADDED)
    with pytest.raises(
        ConfigurationError, match=r"edp_overlap=True .* moe_pad_expert_input_to_capacity=False"
    ):
        config_for("auto", 2, edp_overlap=True, sequence_parallel=False, **PADDED)
    with pytest.raises(ConfigurationError, match=r"edp_overlap=True .* take effect under EDP only"):
        config_for("auto", 2, edp_overlap=True, moe_edp=False, sequence_parallel=True)
