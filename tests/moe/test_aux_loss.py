"""The forms of the auxiliary loss as functions, and the recursion of its coefficient."""

import math

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import switch_load_balancing_loss_func
from torch import Tensor

from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.moe.aux_loss import AdaptiveAuxLossCoefficients, scale_value, squared_load_balancing_loss
from tests.cases import every
from tests.moe.worlds import on_ranks

EXPERTS, TOKENS, TOPK = 8, 40, 2


def logits() -> Tensor:
    generator = torch.Generator().manual_seed(3)
    skew = torch.linspace(-1, 1, EXPERTS, dtype=torch.float64)
    noise = torch.randn(TOKENS, EXPERTS, generator=generator, dtype=torch.float64)
    return (noise + skew).requires_grad_()


def squared(scores: Tensor, coefficient: float = 0.3) -> Tensor:
    world = torch.distributed.group.WORLD
    assert world is not None
    return squared_load_balancing_loss(scores, TOKENS, coefficient, world)


@on_ranks(1)
def test_eq_4() -> None:
    z = logits()
    mean_gate = z.softmax(-1).mean(0)
    expected = 0.3 * sum((1 / EXPERTS - mean_gate[j]) ** 2 for j in range(EXPERTS))
    found = squared(z.softmax(-1))
    torch.testing.assert_close(found, expected)
    for left, right in zip(torch.autograd.grad(found, z), torch.autograd.grad(expected, z), strict=True):
        torch.testing.assert_close(left, right)


@on_ranks(1)
def test_eq_4_vanishes_at_a_uniform_mean_gate() -> None:
    gates = torch.eye(EXPERTS, dtype=torch.float64).repeat(TOKENS // EXPERTS, 1).requires_grad_()
    loss = squared(gates)
    assert loss.item() == 0.0
    assert torch.autograd.grad(loss, gates)[0].abs().max() == 0.0


@on_ranks(1)
def test_the_switch_gradient_is_half_the_experts_times_larger_where_load_follows_the_gate() -> None:
    z = logits()
    scores = z.softmax(-1)
    load = scores.detach().sum(0) * TOPK
    switch = switch_load_balancing_loss_func(scores, load, TOKENS, TOPK, EXPERTS, 0.3)
    (of_switch,) = torch.autograd.grad(switch, z, retain_graph=True)
    (of_square,) = torch.autograd.grad(squared(scores), z)
    assert of_square.abs().max() > 1e-6
    torch.testing.assert_close(of_switch, EXPERTS / 2 * of_square)


def test_scale_value_leaves_the_gradient() -> None:
    x = torch.tensor(3.0, requires_grad=True)
    y = scale_value(x.square(), 0.25)
    assert y.item() == 2.25
    assert torch.autograd.grad(y, x)[0].item() == 6.0


def test_eq_7_to_9() -> None:
    coefficients = AdaptiveAuxLossCoefficients(3)
    assert coefficients.values == [0.01] * 3
    rates = [[0.0, 0.03, 0.4], [0.02, 0.001, 0.05]]
    expected = [0.01] * 3
    for step in rates:
        coefficients.update(step)
        expected = [0.99 * a + 0.01 * min(d / 5, 0.01) for a, d in zip(expected, step, strict=True)]
    assert coefficients.values == pytest.approx(expected, rel=1e-15)
    assert len({*expected}) == 3


def test_step_response() -> None:
    """Time constant of 100 steps, half-life of 69: from alpha_max towards xi * d."""
    coefficients = AdaptiveAuxLossCoefficients(1)
    for _ in range(69):
        coefficients.update([0.01])
    target, start = 0.002, 0.01
    assert (coefficients.values[0] - target) / (start - target) == pytest.approx(0.5, abs=0.001)
    for _ in range(5000):
        coefficients.update([0.01])
    assert coefficients.values[0] == pytest.approx(target, rel=1e-12)


@every(("rate", "estimate"), [(0.0, 0.0), (0.049, 0.0098), (0.05, 0.01), (0.9, 0.01)])
def test_the_estimate_bends_at_a_drop_rate_of_five_percent(rate: float, estimate: float) -> None:
    coefficients = AdaptiveAuxLossCoefficients(1, smoothing=0.0)
    coefficients.update([rate])
    assert coefficients.values == [pytest.approx(estimate, rel=1e-12)]


def test_figure_4() -> None:
    """Its readings: coefficient = drop rate / 5 once settled."""
    coefficients = AdaptiveAuxLossCoefficients(3)
    for _ in range(3000):
        coefficients.update([0.017, 0.0435, 0.008])
    assert coefficients.values == pytest.approx([0.0034, 0.0087, 0.0016], rel=1e-6)


def test_the_initial_value_is_a_choice() -> None:
    assert AdaptiveAuxLossCoefficients(2, maximum=0.05).values == [0.05, 0.05]
    assert AdaptiveAuxLossCoefficients(2, initial=0.001).values == [0.001, 0.001]


@every("rate", [math.nan, -0.001, 1.001, math.inf])
def test_a_drop_rate_that_is_none(rate: float) -> None:
    coefficients = AdaptiveAuxLossCoefficients(2)
    with pytest.raises(ConfigurationError, match=r"drop rate of MoE layer 2 is .*, expected 0 to 1"):
        coefficients.update([0.1, rate])
    assert coefficients.values == [0.01, 0.01]


def test_a_drop_rate_too_few() -> None:
    with pytest.raises(ConfigurationError, match="1 drop rates for 2 MoE layers"):
        AdaptiveAuxLossCoefficients(2).update([0.1])


def test_state_continues_to_the_bit() -> None:
    first, second = AdaptiveAuxLossCoefficients(2), AdaptiveAuxLossCoefficients(2)
    first.update([0.011, 0.037])
    second.load_state_dict(first.state_dict())
    for coefficients in (first, second):
        coefficients.update([0.02, 0.003])
    assert first.values == second.values


@every(
    ("values", "message"),
    [
        ([0.01], "1 MoE layers, the model has 2"),
        ([0.01, math.nan], "MoE layer 2 is nan, expected a finite number >= 0"),
        ([-0.01, 0.01], "MoE layer 1 is -0.01"),
    ],
)
def test_a_state_that_is_none(values: list[float], message: str) -> None:
    coefficients = AdaptiveAuxLossCoefficients(2)
    with pytest.raises(ConfigurationError, match=message):
        coefficients.load_state_dict({"aux_loss_coefficients": values})
    assert coefficients.values == [0.01, 0.01]
