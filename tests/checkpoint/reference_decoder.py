"""A Llama-like decoder, dense or MoE, in plain torch on tensors by meaning: what a model computes, for comparison."""

import torch
from torch import Tensor
from torch.nn import functional as F

from nemo_skymoe.checkpoint.tensors.model import Key, Weights

EPSILON = 1e-6


def logits(weights: Weights, tokens_T: Tensor, logit_norm: bool = False) -> Tensor:
    """Logits [tokens, vocabulary] in float32.

    Args:
        weights: The model.
        tokens_T: One sequence.
        logit_norm: Normalise gating logits as the released Skywork-MoE does, by their sample standard deviation.
    """

    def read(kind: str, layer: int | None = None, expert: int | None = None) -> Tensor:
        return weights.read(Key(kind, layer, expert)).float()

    sizes = weights.architecture
    embedding = read("embedding")
    x_TH = embedding[tokens_T]
    for layer in range(sizes.num_layers):
        h_TH = _norm(x_TH, read("attention_norm", layer))
        heads = [h_TH @ read(kind, layer).T for kind in ("query", "key", "value")]
        q, k, v = (head.unflatten(-1, (-1, sizes.head_size)).transpose(0, 1) for head in heads)
        mixed = F.scaled_dot_product_attention(
            _rotate(q)[None], _rotate(k)[None], v[None], is_causal=True, enable_gqa=True
        )
        x_TH = x_TH + mixed[0].transpose(0, 1).flatten(1) @ read("attention_output", layer).T
        h_TH = _norm(x_TH, read("mlp_norm", layer))
        if sizes.num_moe_experts is None:
            x_TH = x_TH + _mlp(h_TH, *(read(kind, layer) for kind in ("gate", "up", "down")))
            continue
        gating_TE = h_TH @ read("router", layer).T
        if logit_norm:
            gating_TE = gating_TE / gating_TE.std(dim=-1, keepdim=True)
        top, chosen = gating_TE.softmax(-1).topk(sizes.moe_router_topk)
        share_TE = torch.zeros_like(gating_TE).scatter(1, chosen, top / top.sum(-1, keepdim=True))
        outputs = [
            share_TE[:, [expert]]
            * _mlp(h_TH, *(read(kind, layer, expert) for kind in ("gate", "up", "down")))
            for expert in range(sizes.num_moe_experts)
        ]
        x_TH = x_TH + torch.stack(outputs).sum(0)
    output = embedding if sizes.tied_embeddings else read("output")
    return _norm(x_TH, read("final_norm")) @ output.T


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPSILON) * weight


def _mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T


def _rotate(x: Tensor) -> Tensor:
    length, size = x.shape[-2:]
    frequencies = 10000.0 ** (-torch.arange(0, size, 2) / size)
    angles = torch.outer(torch.arange(length), frequencies).repeat(1, 2)
    first, second = x.chunk(2, dim=-1)
    return x * angles.cos() + torch.cat((-second, first), dim=-1) * angles.sin()
