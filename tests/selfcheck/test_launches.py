"""The number of kernels that a router starts, counted without a GPU."""

from typing import Any

import torch
from megatron.core.transformer.moe.router import TopKRouter

from nemo_skymoe.moe.router import SkyworkRouter
from nemo_skymoe.selfcheck.launches import Launches, launches
from tests.cases import every
from tests.moe.worlds import configuration, groups, make_router, on_ranks


def test_views_and_reserved_memory_do_not_count() -> None:
    x = torch.ones(4, 3)
    with Launches() as counted:
        y = x.t()[1:].reshape(-1).detach() + 1
        torch.empty_like(y).copy_(y)
        y.add_(1).unsqueeze(0).expand(2, -1)
    assert counted.names == [
        "aten.clone.default",
        "aten.add.Tensor",
        "aten.copy_.default",
        "aten.add_.Tensor",
    ]


def kernels(router_class: type[TopKRouter], options: dict[str, Any]) -> tuple[int, int]:
    """Forward and backward of a second micro-batch in bf16."""
    values = {"params_dtype": torch.bfloat16, "moe_router_dtype": "fp32", "num_moe_experts": 16, **options}
    router = make_router(configuration(**values), router_class)
    x = torch.randn(64, 2, 16).bfloat16().requires_grad_()
    found = (0, 0)
    for _ in range(2):
        forward, (probs, _) = launches(lambda: router(x))
        gradient = torch.ones_like(probs)
        backward, _ = launches(lambda probs=probs, gradient=gradient: probs.backward(gradient))
        found = (forward, backward)
    return found


@every("capacity", [1.25, None])
@on_ranks(1)
def test_normalisation_and_telemetry_start_few_kernels_more_than_the_stock_router(
    capacity: float | None,
) -> None:
    """At a capacity of 1.25, Megatron-Core 0.15 starts 31 and 19."""
    with groups():
        options = {"moe_expert_capacity_factor": capacity}
        stock, ours = (kernels(router, options) for router in (TopKRouter, SkyworkRouter))
        assert ours[0] <= stock[0] + 8, (ours, stock)
        assert ours[1] <= stock[1] + 2, (ours, stock)
        telemetry_off = kernels(SkyworkRouter, {**options, "moe_router_telemetry": False})
        assert telemetry_off[0] <= stock[0] + 2, (telemetry_off, stock)
