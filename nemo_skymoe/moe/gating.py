"""Normalisation of gating logits (eq. 6), as pure functions on tensors.

Shape suffixes: S sequence, B micro-batch, E experts.
"""

import math
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor

# This is smaller than any rounding of a softmax and larger than the smallest normal float. It orders exact ties in
# a top-k, and leaves the gate itself exactly uniform.
_TIE_STEP = 1e-30
# This is far below the square of every eps. It keeps the inverse deviation of a row of equal logits finite.
_NO_VARIANCE = 1e-60


class _Normalize(torch.autograd.Function):
    """Forward pass and analytic gradient in few kernels. They save the result and one number per row.

    Each direction is a layer norm without weights, whose deviation has the divisor E: `gain` turns it into eq. (6).
    """

    @staticmethod
    def forward(ctx, logits: Tensor, scale: float, correction: int, eps: float, ties: Tensor) -> Tensor:
        experts = logits.shape[-1]
        freedom = max(experts - correction, 1)
        ctx.gain = gain = scale * math.sqrt(freedom / experts)
        # float64 holds the square of every float32. In float32, logits beyond 1e19 would have an infinite standard
        # deviation and hence a uniform gate.
        unit, _, inverse = torch.native_layer_norm(logits.double(), [experts], None, None, _NO_VARIANCE)
        varied = inverse < math.sqrt(experts / freedom) / max(eps, _NO_VARIANCE**0.49)
        normalized = torch.addcmul(ties, unit, varied, value=gain, out=torch.empty_like(logits))
        # In the backward pass an equal row's gradient is that of un-normalised logits.
        ctx.save_for_backward(normalized, torch.where(varied, inverse * gain**2, gain))
        return normalized

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        # For z~ = s (z - mean) / std the gradient is s / std * (g - mean(g) - z~ <g, z~> / (s^2 (E - correction))):
        # the second and third term take away the directions in which z~ cannot move, its mean and its length. A layer
        # norm's gradient at z~ takes away the same.
        normalized, factor = ctx.saved_tensors
        mean, inverse = _mean_and_inverse_deviation(
            factor.shape, 1 / ctx.gain, normalized.dtype, factor.device
        )
        result, _, _ = torch.ops.aten.native_layer_norm_backward(
            gradients[0], normalized, normalized.shape[-1:], mean, inverse, None, None, [True, False, False]
        )
        return result.mul_(factor), None, None, None, None


@lru_cache(maxsize=8)
def _mean_and_inverse_deviation(
    shape: torch.Size, inverse: float, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return those of normalised rows. They are kept, because making them would take two kernels of every pass."""
    return torch.zeros(shape, dtype=dtype, device=device), torch.full(
        shape, inverse, dtype=dtype, device=device
    )


def normalize_gating_logits(
    logits: Tensor, scale: float = 1.0, correction: int = 1, eps: float = 1e-6
) -> Tensor:
    """Normalise every token's gating logits to mean zero and standard deviation `scale` (eq. 6).

    Args:
        logits: [..., E], any floating type.
        scale: lambda, the standard deviation of the result.
        correction: 1 for the sample's standard deviation, as in the released model, 0 for the population's.
        eps: A row whose standard deviation is not above this counts as equal logits: its gate is uniform and
            its gradient that of an un-normalised softmax, never NaN.

    Returns:
        [..., E] in float32, or float64 for float64 logits.
    """
    return normalize_and_break_ties(logits, scale, correction, eps, None)


def normalize_and_break_ties(
    logits: Tensor, scale: float, correction: int, eps: float, ties: Tensor | None
) -> Tensor:
    """Normalise as `normalize_gating_logits` does, and add `ties`.

    Args:
        logits: This and the next three arguments are those of `normalize_gating_logits`.
        ties: [..., E] from `tie_order`, or None. They are too small to change anything but exact ties.
    """
    logits = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    ties = logits.new_zeros(()) if ties is None else ties
    return cast(Any, _Normalize.apply(logits, scale, correction, eps, ties))


@lru_cache(maxsize=8)
def tie_order(
    sequence: int,
    batch: int,
    num_experts: int,
    topk: int,
    tensor: tuple[int, int],
    context: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Return small numbers that spread tokens with equal logits over the experts when they are added to the logits.

    The token with the global index i prefers the experts i*k, i*k + 1, ... (modulo E). A router that has learned
    nothing yet therefore loads all experts alike, and the choice is the same however the tokens are spread over ranks.
    The numbers are below the rounding of any other logit and of the softmax, so the gate itself does not change.

    Args:
        sequence: Local sequence length S of the router's input [S, B, H].
        batch: Sequences B in the micro-batch.
        num_experts: E.
        topk: k, experts per token.
        tensor: (rank, size) over which the sequence is split; (0, 1) without sequence parallelism.
        context: (rank, size) of context parallelism.
        dtype: The dtype of the logits.
        device: The device of the logits.

    Returns:
        The numbers [S, B, E] to add.
    """
    token_SB1 = global_token_index(sequence, batch, tensor, context, device).unsqueeze(-1)
    expert_E = torch.arange(num_experts, device=device)
    place_SBE = (expert_E - token_SB1 * topk) % num_experts
    return (num_experts - place_SBE).to(dtype) * _TIE_STEP


def global_token_index(
    sequence: int, batch: int, tensor: tuple[int, int], context: tuple[int, int], device: torch.device
) -> Tensor:
    """Return the index of each local token in its micro-batch, as a single rank would count it.

    Context parallelism gives rank c of n the chunks c and 2n - 1 - c of the sequence (Megatron's zigzag). Sequence
    parallelism then splits the positions of a rank into equal consecutive parts.

    Args:
        sequence: All arguments are those of `tie_order`.

    Returns:
        [S, B] int64.
    """
    position_S = torch.arange(sequence, device=device) + tensor[0] * sequence
    rank, size = context
    if size > 1:
        chunk = sequence * tensor[1] // 2
        first, second = rank * chunk, (2 * size - 2 - rank) * chunk
        position_S = position_S + torch.where(position_S < chunk, first, second)
    return position_S.unsqueeze(1) * batch + torch.arange(batch, device=device)
