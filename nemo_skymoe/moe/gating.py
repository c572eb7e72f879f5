"""Gating logit normalisation (eq. 6): pure functions on tensors.

Shape suffixes: S sequence, B micro-batch, E experts.
"""

from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor

# Smaller than any rounding of a softmax, larger than the smallest normal float: it orders exact ties
# in a top-k and leaves the gate itself exactly uniform.
_TIE_STEP = 1e-30


class _Normalize(torch.autograd.Function):
    """The forward and its analytic gradient: a dozen kernels, the result and one number a row saved."""

    @staticmethod
    def forward(
        ctx, logits: Tensor, scale: float, correction: int, eps: float, ties: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        # In float64, where the square of every float32 is a number: in float32 logits beyond 1e19 would have an
        # infinite standard deviation and hence a uniform gate. Subtracting one entry first makes rows of equal
        # logits exactly zero, whatever their common offset.
        centred = logits.double() - logits[..., :1]
        centred -= centred.mean(dim=-1, keepdim=True)
        freedom = max(logits.shape[-1] - correction, 1)
        std = torch.linalg.vector_norm(centred, dim=-1, keepdim=True) * freedom**-0.5
        flat = std <= eps
        factor = scale / std
        normalized = centred.mul_(factor.masked_fill(flat, 0.0)).to(logits.dtype)
        if ties is not None:
            normalized += ties
        # A flat row passes its gradient on as a softmax of un-normalised logits would.
        ctx.save_for_backward(normalized, factor.masked_fill_(flat, 1.0))
        ctx.curvature = 1.0 / (scale * scale * freedom)
        ctx.mark_non_differentiable(flat)
        return normalized, flat

    @staticmethod
    def backward(ctx, *gradients: Tensor):
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
        scale: lambda, the standard deviation afterwards.
        correction: 1 for the sample standard deviation of the released weights, 0 for the population one.
        eps: A row whose standard deviation is not above this counts as equal logits: its gate is uniform and
            its gradient that of an un-normalised softmax, never NaN.

    Returns:
        [..., E] in float32, or float64 for float64 logits.
    """
    return normalize_and_break_ties(logits, scale, correction, eps, None)[0]


def normalize_and_break_ties(
    logits: Tensor, scale: float, correction: int, eps: float, ties: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`normalize_gating_logits`, with `ties` added, and [..., 1] booleans: the rows of equal logits.

    Args:
        logits: As the other arguments, those of `normalize_gating_logits`.
        ties: [..., E] from `tie_order`, added to the result; too small to change anything but exact ties.
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
    """What to add to normalised logits so that tokens with equal logits spread over the experts.

    Token i prefers experts i*k, i*k + 1, ... (modulo E), i its global index: a router that knows nothing
    yet loads all experts alike, and the choice is the same however the tokens are spread over ranks. The
    values are below the rounding of any other logit and of the softmax: the gate itself does not change.

    Args:
        sequence: Local sequence length S of the router's input [S, B, H].
        batch: Sequences B in the micro-batch.
        num_experts: E.
        topk: k, experts per token.
        tensor: (rank, size) over which the sequence is split; (0, 1) without sequence parallelism.
        context: (rank, size) of context parallelism.
        dtype: Of the logits.
        device: Of the logits.

    Returns:
        [S, B, E] to add, and [S, B, E] booleans: the experts that a token of equal logits gets.
    """
    token_SB1 = global_token_index(sequence, batch, tensor, context, device).unsqueeze(-1)
    expert_E = torch.arange(num_experts, device=device)
    place_SBE = (expert_E - token_SB1 * topk) % num_experts
    return (num_experts - place_SBE).to(dtype) * _TIE_STEP, place_SBE < topk


def global_token_index(
    sequence: int, batch: int, tensor: tuple[int, int], context: tuple[int, int], device: torch.device
) -> Tensor:
    """Index of each local token in its micro-batch, as TP = CP = 1 would count it; arguments as `tie_order`.

    Context parallelism gives rank c of n the chunks c and 2n - 1 - c of the sequence (Megatron's zigzag);
    sequence parallelism then splits what a rank holds into equal consecutive parts.

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
