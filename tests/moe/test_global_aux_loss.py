"""The loss over the whole batch: as strong on many data-parallel ranks as on one, and what it depends on is said."""

import logging
from typing import Any

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from nemo_skymoe.moe import router as router_module
from nemo_skymoe.ranks import run_ranks
from tests.moe.worlds import Layout, configuration, generator, groups, in_world, make_router, on_ranks

pytestmark = pytest.mark.skipif(
    not hasattr(TopKRouter, "_apply_global_aux_loss"), reason="Megatron 0.15 brought global_aux_loss"
)
OPTIONS: dict[str, Any] = {
    "moe_router_load_balancing_type": "global_aux_loss",
    "moe_aux_loss_coeff": 1.0,
    "moe_router_logit_norm_scale": None,
}


def mean_gradient(names: list[str], per_token: bool) -> Tensor:
    """Gradient of the loss alone, as Megatron reduces it over data-parallel ranks and a step's micro-batches."""
    with groups(Layout()):
        MoEAuxLossAutoScaler.main_loss_backward_scale = torch.tensor(1.0)
        router = make_router(configuration(**OPTIONS, calculate_per_token_loss=per_token))
        gradient, tokens = torch.zeros_like(router.weight), torch.zeros(())
        for name in names[torch.distributed.get_rank() :: torch.distributed.get_world_size()]:
            x = torch.randn(16, 2, 16, generator=generator(name), dtype=torch.float64, requires_grad=True)
            gradient += torch.autograd.grad(0 * router(x)[0].sum(), router.weight)[0]
            tokens += 32
        torch.distributed.all_reduce(gradient)
        torch.distributed.all_reduce(tokens)
        return gradient / (tokens if per_token else len(names))


def test_its_strength_does_not_depend_on_the_data_parallel_size() -> None:
    """With equal micro-batches a running mean over them is the mean: every division of the batch agrees."""
    for per_token in (False, True):
        one, two, four = (
            run_ranks(in_world, size, mean_gradient, ["equal"] * 4, per_token)[0] for size in (1, 2, 4)
        )
        assert one.norm() > 0.01
        for found in (two, four):
            assert (found - one).norm() <= 1e-10 * one.norm()


def gradients_of_unequal_pairs() -> list[Tensor]:
    return [mean_gradient([f"u{pair} {number}" for number in range(2)], False) for pair in range(10)]


def test_with_unequal_micro_batches_it_depends_on_their_order_as_the_warning_says() -> None:
    one, two = (run_ranks(in_world, size, gradients_of_unequal_pairs)[0] for size in (1, 2))
    differences = [float((b - a).norm() / a.norm()) for a, b in zip(one, two, strict=True)]
    assert min(differences) > 0.2 and max(differences) < 0.75, differences


@on_ranks(1)
def test_it_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    router_module._warn_of_running_mean.cache_clear()
    with groups(), caplog.at_level(logging.WARNING, logger="nemo_skymoe"):
        for _ in range(2):
            make_router(configuration(**OPTIONS))
        make_router(configuration())
    (record,) = caplog.records
    assert "running mean" in record.getMessage()
