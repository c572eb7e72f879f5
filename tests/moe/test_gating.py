"""The normalised gate as a function: what eq. (6) implies, whatever the logits."""

import math

import torch
from torch import Tensor

from nemo_skymoe.moe.gating import (
    global_token_index,
    normalize_and_break_ties,
    normalize_gating_logits,
    tie_order,
)
from tests.cases import every

CPU = torch.device("cpu")
EXPERTS = 16


def logits(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(*shape, EXPERTS, generator=generator, dtype=torch.float64).mul(3).to(dtype)


def ties(sequence: int, batch: int, topk: int = 2, experts: int = EXPERTS, **place) -> Tensor:
    place = {"tensor": (0, 1), "context": (0, 1), **place}
    return tie_order(sequence, batch, experts, topk, dtype=torch.float32, device=CPU, **place)


@every("correction", [0, 1])
@every("scale", [0.5, 1.0, 2.0])
def test_it_is_eq_6(scale: float, correction: int) -> None:
    z = logits(50)
    expected = scale * (z - z.mean(-1, keepdim=True)) / z.std(-1, correction=correction, keepdim=True)
    torch.testing.assert_close(
        normalize_gating_logits(z, scale, correction), expected, rtol=1e-13, atol=1e-13
    )


@every("correction", [0, 1])
@every("scale", [0.5, 1.0, 2.0])
def test_the_standard_deviation_is_the_scale(scale: float, correction: int) -> None:
    normalized = normalize_gating_logits(logits(50, dtype=torch.float32), scale, correction)
    std = normalized.double().std(-1, correction=correction)
    torch.testing.assert_close(std, torch.full_like(std, scale), rtol=1e-6, atol=0)
    assert normalized.double().mean(-1).abs().max() < 1e-6 * scale


def test_the_released_weights_have_the_sample_deviation() -> None:
    z = logits(10)
    ratio = normalize_gating_logits(z) / normalize_gating_logits(z, correction=0)
    torch.testing.assert_close(ratio, torch.full_like(ratio, math.sqrt(15 / 16)))


def test_a_scaled_weight_matrix_or_a_common_shift_changes_nothing() -> None:
    x = torch.randn(50, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weight = torch.randn(EXPERTS, 24, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    shift = torch.randn(24, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    gate = normalize_gating_logits(x @ weight.t())
    for other in (1e-3 * weight, 1e4 * weight, weight + shift, 100 * weight - 7 * shift):
        torch.testing.assert_close(normalize_gating_logits(x @ other.t()), gate, rtol=1e-9, atol=1e-9)


def test_a_large_common_offset_costs_no_accuracy() -> None:
    """Why the mean is removed although a softmax does not see it: float32 has 24 bits, and so has the offset."""
    z = logits(50).mul(64).round()
    offset = (z + 2.0**16).float()
    torch.testing.assert_close(normalize_gating_logits(offset), normalize_gating_logits(z.float()))


@every(
    ("given", "result"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_dtype(given: torch.dtype, result: torch.dtype) -> None:
    z = logits(5, dtype=given)
    normalized = normalize_gating_logits(z)
    assert normalized.dtype == result
    torch.testing.assert_close(normalized, normalize_gating_logits(z.to(result)), rtol=0, atol=0)


@every("correction", [0, 1])
def test_gradient(correction: int) -> None:
    z = logits(6).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: normalize_gating_logits(z, 0.7, correction), z)


def test_the_gradient_sums_to_zero_and_does_not_change_the_deviation() -> None:
    z = logits(50).requires_grad_()
    upstream = torch.randn(50, EXPERTS, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    (gradient,) = torch.autograd.grad(normalize_gating_logits(z), z, upstream)
    centred = (z - z.mean(-1, keepdim=True)).detach()
    assert gradient.sum(-1).abs().max() < 1e-13
    assert (gradient * centred).sum(-1).abs().max() < 1e-12
    assert gradient.norm() > 0.1


@every("offset", [0.0, 0.1, -3e4])
@every("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_equal_logits(offset: float, dtype: torch.dtype) -> None:
    """An exactly uniform gate and the gradient of a softmax that is not normalised."""
    z = torch.full((3, EXPERTS), offset, dtype=dtype, requires_grad=True)
    gate = normalize_gating_logits(z).softmax(-1)
    assert torch.equal(gate, torch.full_like(gate, 1 / EXPERTS))
    loss = (gate * torch.arange(EXPERTS)).sum()
    (gradient,) = torch.autograd.grad(loss, z)
    plain = torch.full((3, EXPERTS), offset, dtype=gate.dtype, requires_grad=True)
    (expected,) = torch.autograd.grad((plain.softmax(-1) * torch.arange(EXPERTS)).sum(), plain)
    assert gradient.abs().max() > 0
    torch.testing.assert_close(gradient, expected.to(dtype))


def test_equal_rows_among_others_do_not_touch_them() -> None:
    z = logits(4)
    z[2] = 1.5
    others = [0, 1, 3]
    torch.testing.assert_close(normalize_gating_logits(z)[others], normalize_gating_logits(z[others]))


def test_rounding_noise_counts_as_equal_logits() -> None:
    z = 1 + 1e-8 * logits(5)
    assert torch.equal(normalize_gating_logits(z), torch.zeros_like(z))
    assert normalize_gating_logits(z, eps=1e-10).std() > 0.9


def test_one_expert_and_no_tokens() -> None:
    assert torch.equal(normalize_gating_logits(torch.tensor([[3.0], [4.0]])), torch.zeros(2, 1))
    assert normalize_gating_logits(torch.zeros(0, EXPERTS)).shape == (0, EXPERTS)


def test_equal_logits_spread_over_the_experts_by_token_index() -> None:
    z = normalize_and_break_ties(torch.zeros(16, 1, EXPERTS), 1.0, 1, 1e-6, ties(16, 1))
    chosen = z.topk(2).indices
    assert chosen[:3, 0].tolist() == [[0, 1], [2, 3], [4, 5]]
    assert torch.equal(torch.bincount(chosen.flatten(), minlength=EXPERTS), torch.full((EXPERTS,), 2))
    gate = z.softmax(-1)
    assert torch.equal(gate, torch.full_like(gate, 1 / EXPERTS))


def test_ties_change_no_other_row() -> None:
    z = logits(8, 2, dtype=torch.float32)
    broken = normalize_and_break_ties(z, 1.0, 1, 1e-6, ties(8, 2))
    assert torch.equal(broken, normalize_gating_logits(z))


@every("experts", [3, 8])
@every("topk", [1, 2, 3])
def test_every_token_gets_its_own_experts_in_turn(experts: int, topk: int) -> None:
    chosen = ties(5, 3, topk, experts).topk(topk).indices.flatten(0, 1)
    expected = (torch.arange(15)[:, None] * topk + torch.arange(topk)) % experts
    assert torch.equal(chosen, expected)


@every("dtype", [torch.float32, torch.float64])
def test_equal_logits_of_any_size_and_number_are_exactly_equal(dtype: torch.dtype) -> None:
    """The mean of equal numbers is that number, however it is summed."""
    values = torch.logspace(-30, 38, 200, dtype=torch.float64)
    for experts in (3, 5, 7, 16, 33, 48, 100, 160, 511, 512):
        z = values.to(dtype)[:, None].expand(-1, experts) * torch.tensor([[1.0]] * 100 + [[-1.0]] * 100)
        assert not normalize_gating_logits(z, eps=1e-12).any(), experts


@every("tensor", [1, 2, 4])
@every("context", [1, 2, 4])
def test_token_index_over_ranks(tensor: int, context: int) -> None:
    """Sequence and context parallelism deal the positions of one rank, each with its own index."""
    length, batch = 32, 3
    whole = global_token_index(length, batch, (0, 1), (0, 1), CPU)
    assert torch.equal(whole, torch.arange(length * batch).view(length, batch))
    pieces = torch.arange(length).chunk(2 * context)
    for c in range(context):
        mine = torch.cat([pieces[c], pieces[2 * context - 1 - c]]) if context > 1 else torch.arange(length)
        for t, positions in enumerate(mine.chunk(tensor)):
            index = global_token_index(len(positions), batch, (t, tensor), (c, context), CPU)
            assert torch.equal(index, whole[positions])


def test_logits_of_any_size() -> None:
    """Over the whole range of float32 a scaled row has the gate of the row, and 1 / scale of its gradient."""
    z = logits(20, dtype=torch.float32) / 16
    upstream = torch.randn(z.shape, generator=torch.Generator().manual_seed(4))

    def gate_and_gradient(rows: Tensor) -> tuple[Tensor, Tensor]:
        rows = rows.clone().requires_grad_()
        gate = normalize_gating_logits(rows, eps=0.0)
        return gate.detach(), torch.autograd.grad((gate * upstream).sum(), rows)[0].double()

    expected, gradient = gate_and_gradient(z)
    assert expected.std() > 0.9
    for exponent in (-60, 60, 64, 100, 120):
        factor = 2.0**exponent
        found, scaled = gate_and_gradient(z * factor)
        torch.testing.assert_close(found, expected, msg=f"2^{exponent}")
        if exponent < 120:  # beyond, the gradient is below float32
            torch.testing.assert_close(scaled * factor, gradient, rtol=1e-5, atol=1e-6, msg=f"2^{exponent}")
