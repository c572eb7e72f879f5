"""A capacity beyond the number of tokens drops nothing: results and gradients are those without a capacity."""

import math
from typing import Any

import torch
from torch import Tensor

from nemo_skymoe.moe.capacity import with_capacity_in_reach
from nemo_skymoe.ranks import run_ranks
from tests.cases import every
from tests.moe.worlds import (
    Layout,
    Training,
    configuration,
    generator,
    groups,
    in_world,
    make_router,
    on_ranks,
    relative_errors,
)

ROOMY = [(8, 1.25), (8, 1.0), (2, 4.0), (2, 1e6), (3, 2.7)]


@on_ranks(1)
def test_the_router_drops_nothing() -> None:
    with groups():
        for topk, factor in ROOMY:
            for tokens in (1, 2, 7):
                x = torch.randn(tokens, 1, 16, generator=generator("roomy"), dtype=torch.float64)
                expected, plain = make_router(configuration(moe_router_topk=topk))(x)
                for policy in ("probs", "position"):
                    for padded in (False, True):
                        router = make_router(
                            configuration(
                                moe_router_topk=topk,
                                moe_expert_capacity_factor=factor,
                                moe_token_drop_policy=policy,
                                moe_pad_expert_input_to_capacity=padded,
                            )
                        )
                        probs, routing_map = router(x)
                        assert torch.equal(probs, expected), (topk, factor, tokens, policy, padded)
                        assert torch.equal(routing_map, torch.ones_like(plain) if padded else plain)


def test_no_rounding_gives_a_place_too_many_and_a_smaller_factor_is_left_alone() -> None:
    for experts in (2, 3, 5, 7, 8, 16, 60, 129):
        for topk in range(1, min(experts, 9)):
            config: Any = type("Config", (), {})()
            config.num_moe_experts, config.moe_router_topk = experts, topk
            config.moe_expert_capacity_factor = experts / topk
            factor = with_capacity_in_reach(config).moe_expert_capacity_factor
            for tokens in (1, 2, 3, 10, 4095, 8192, 2**20 + 1):
                assert math.ceil(tokens * topk / experts * factor) == tokens
            config.moe_expert_capacity_factor = experts / topk * 0.99
            assert with_capacity_in_reach(config) is config


def gradients(layout: Layout, options: dict[str, Any]) -> dict[str, Tensor]:
    with groups(layout):
        training = Training(layout, moe_router_topk=3, **options)
        training.run()
        return training.gradients()


@every("padded", [False, True])
def test_nor_do_the_dispatchers(padded: bool) -> None:
    one = run_ranks(in_world, 1, gradients, Layout(), {})[0]
    roomy = {"moe_expert_capacity_factor": 4.0, "moe_pad_expert_input_to_capacity": padded}
    edp = {**roomy, "moe_edp": True}
    for layout, options in (
        (Layout(), {**roomy, "moe_token_dispatcher_type": "alltoall"}),
        (Layout(ep=2), {**roomy, "moe_token_dispatcher_type": "alltoall"}),
        (Layout(tp=2, ep=2), {**edp, "edp_dispatcher": "allgather"}),
        (Layout(tp=2, ep=2), {**edp, "edp_dispatcher": "alltoall"}),
        (Layout(tp=2, ep=2), {**edp, "moe_capacity_scope": "edp"}),
        (Layout(tp=2, ep=2, sp=False), edp),
    ):
        found = run_ranks(in_world, layout.tp * max(layout.ep // layout.tp, 1), gradients, layout, options)[0]
        errors = relative_errors(found, one)
        assert max(errors.values()) <= 1e-10, (layout, options, max(errors.items(), key=lambda item: item[1]))
