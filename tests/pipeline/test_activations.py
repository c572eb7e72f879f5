"""The activations that `memory` counts, against the bytes autograd keeps of the same layer in PyTorch."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nemo_skymoe.architecture import Architecture
from nemo_skymoe.pipeline.memory import layer_footprint
from nemo_skymoe.pipeline.training import Training
from tests.cases import every

S, H, HEADS, GROUPS, FFN = 48, 64, 4, 2, 176
DENSE = Architecture(1, H, FFN, HEADS, vocab_size=128, num_query_groups=GROUPS)
RSTD = 4 * 2 * S  # the two norms' fp32 factor a token, which is left out of the count


class Norm(torch.autograd.Function):
    """RMSNorm as a fused kernel: keeps its input and one fp32 factor a token."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        factor = x.float().pow(2).mean(-1, keepdim=True).rsqrt()
        ctx.save_for_backward(x, factor)
        return (x * factor).to(x.dtype)


class SwiGLU(torch.autograd.Function):
    """As a fused kernel, weighted by the gate of a MoE: keeps its input and the weights."""

    @staticmethod
    def forward(ctx: Any, both: Tensor, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(both, *weights)
        gate, up = both.chunk(2, dim=-1)
        product = F.silu(gate) * up
        return (product * weights[0]).to(both.dtype) if weights else product


def attention(x: Tensor) -> Tensor:
    """One sequence [s, h]; FlashAttention keeps query, key, value, output and an fp32 log-sum-exp a head."""
    width = H // HEADS
    projected = F.linear(Norm.apply(x), parameter((HEADS + 2 * GROUPS) * width, H))
    heads = projected.view(S, -1, width).transpose(0, 1)
    # Rotation keeps nothing of its input: a product with constants. Key and value stay as few as their groups are.
    query, key, value = (part.clone() for part in heads.split([HEADS, GROUPS, GROUPS]))
    output = Flash.apply(query, key, value)
    return x + F.linear(output.transpose(0, 1).reshape(S, -1), parameter(H, HEADS * width))


class Flash(torch.autograd.Function):
    """The tensors that flash_attn's backward needs."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        repeated = (part.repeat_interleave(HEADS // GROUPS, dim=0) for part in (key, value))
        output = F.scaled_dot_product_attention(query, *repeated, is_causal=True)
        # The output is stored [s, heads, width], as the projection behind it reads it.
        output = output.transpose(0, 1).contiguous().transpose(0, 1)
        ctx.save_for_backward(query, key, value, output, torch.empty(HEADS, S))
        return output


def parameter(*shape: int) -> Tensor:
    return torch.nn.Parameter(torch.randn(*shape, dtype=torch.bfloat16))


def kept_bytes(run: Callable[[Tensor], Tensor]) -> int:
    """Storage that the graph of `run` holds beside its parameters."""
    kept: dict[int, int] = {}
    alive = []  # an address counts once, so nothing may be freed while counting

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, torch.nn.Parameter) and not isinstance(tensor._base, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        x = torch.randn(S, H, dtype=torch.bfloat16, requires_grad=True) * 1
        output = run(x)
    assert output.requires_grad
    return sum(kept.values())


def test_a_dense_layer():
    def layer(x: Tensor) -> Tensor:
        x = attention(x)
        both = F.linear(Norm.apply(x), parameter(2 * FFN, H))
        return x + F.linear(SwiGLU.apply(both), parameter(H, FFN))

    assert kept_bytes(layer) - RSTD == layer_footprint(DENSE, Training(seq_length=S)).activations


@every("capacity", [None, 1.5])
def test_a_moe_layer(capacity: float | None):
    experts, topk = 4, 2
    model = DENSE.with_experts(experts, topk)
    rows = int(S * topk * (capacity or 1)) // experts
    places = torch.randint(S, (experts * rows,))

    def layer(x: Tensor) -> Tensor:
        x = attention(x)
        normed = Norm.apply(x)
        scores = F.linear(normed, parameter(experts, H)).float().softmax(-1)
        copies = normed.index_select(0, places)
        weights = scores[places, torch.arange(experts).repeat_interleave(rows)][:, None]
        outputs = []
        for mine, gates in zip(copies.split(rows), weights.split(rows), strict=True):
            hidden = SwiGLU.apply(F.linear(mine, parameter(2 * FFN, H)), gates)
            outputs.append(F.linear(hidden, parameter(H, FFN)))
        return x.scatter_add(0, places[:, None].expand(-1, H), torch.cat(outputs))

    counted = layer_footprint(
        model, Training(seq_length=S, capacity_factor=capacity, pad_to_capacity=True)
    ).activations
    # Indices, gates of rows and the router's own tensors: a handful of numbers a token, against 2 h and 6 f.
    beside = S * (9 * experts + 40 * topk)
    assert abs(kept_bytes(layer) - RSTD - counted) <= beside < 0.05 * counted
