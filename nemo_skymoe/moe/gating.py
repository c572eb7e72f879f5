"""Normalisation of gating logits (eq. 6), as pure functions on tensors.

Shape suffixes: S sequence, B micro-batch, E experts.
"""

from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor

# This is smaller than any rounding of a softmax and larger than the smallest normal float. It orders exact ties in
# a top-k, and leaves the gate itself exactly uniform.
_TIE_STEP = 1e-30


class _Normalize(torch.autograd.Function):
    """Forward pass and analytic gradient. They take a dozen kernels, and save the result and one number per row."""

    @staticmethod
    def forward(
        ctx, logits: Tensor, scale: float, correction: int, eps: float, ties: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        # float64 holds the square of every float32. In float32, logits beyond 1e19 would have an infinite standard
        # deviation and hence a uniform gate. Subtracting one entry first makes rows of equal logits exactly zero,
        # whatever value they share: the mean alone may be off by a rounding.
        centred = logits.double() - logits[..., :1]
        centred -= centred.mean(dim=-1, keepdim=True)
        freedom = max(logits.shape[-1] - correction, 1)
        std = torch.linalg.vector_norm(centred, dim=-1, keepdim=True) * freedom**-0.5
        flat = std <= eps
        factor = scale / std
        normalized = centred.mul_(factor.masked_fill(flat, 0.0)).to(logits.dtype)
        if ties is not None:
            normalized += ties
        # A flat row has the factor 1 in the backward pass, so its gradient is that of un-normalised logits.
        ctx.save_for_backward(normalized, factor.masked_fill_(flat, 1.0))
        ctx.curvature = 1.0 / (scale * scale * freedom)
        ctx.mark_non_differentiable(flat)
        return normalized, flat

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        # For z~ = s (z - mean) / std the gradient is s / std * (g - mean(g) - z~ <g, z~> / (s^2 (E - correction))):
        # the second and third term take away the directions in which z~ cannot move, its mean and its length.
        grad = gradients[0]
        normalized, factor = ctx.saved_tensors
        along = (grad * normalized).sum(dim=-1, keepdim=True)
        result = (grad - grad.mean(dim=-1, keepdim=True)).addcmul_(normalized, along, value=-ctx.curvature)
        return result.mul_(factor), None, None, None, None


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
    return normalize_and_break_ties(logits, scale, correction, eps, None)[0]


def normalize_and_break_ties(
    logits: Tensor, scale: float, correction: int, eps: float, ties: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Normalise as `normalize_gating_logits` does, add `ties`, and find the rows of equal logits.

    Args:
        logits: This and the next three arguments are those of `normalize_gating_logits`.
        ties: [..., E] from `tie_order`, or None. They are too small to change anything but exact ties.

    Returns:
        The normalised logits [..., E], and [..., 1] booleans that are true for rows of equal logits.
    """
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    normalized, flat = cast(Any, _Normalize.apply(logits.to(dtype), scale, correction, eps, ties))
    return normalized, flat


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
) -> tuple[Tensor, Tensor]:
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
        The numbers [S, B, E] to add, and [S, B, E] booleans that are true for the experts of a token with equal logits.
    """
    token_SB1 = global_token_index(sequence, batch, tensor, context, device).unsqueeze(-1)
    expert_E = torch.arange(num_experts, device=device)
    place_SBE = (expert_E - token_SB1 * topk) % num_experts
    return (num_experts - place_SBE).to(dtype) * _TIE_STEP, place_SBE < topk


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
