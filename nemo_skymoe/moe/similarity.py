"""Expert similarity (sec. 3.2): how far the experts of a layer have diverged from their common origin."""

from collections.abc import Iterator, Sequence

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor


@torch.no_grad()
def expert_similarity(model_chunks: Sequence[torch.nn.Module]) -> dict[int, float]:
    """Mean cosine over all pairs of experts of a layer, by global layer number.

    An expert is the vector of all its weights. With u_e the unit vectors and E experts the mean over
    ordered pairs is (|sum_e u_e|^2 - E) / (E (E - 1)), which takes one reduction of one expert's size
    over the expert-parallel group a layer. 1 after upcycling by copies, about 0 from scratch.
    """
    return {
        layer.layer_number: _similarity(layer)
        for chunk in model_chunks
        for layer in chunk.modules()
        if isinstance(layer, MoELayer) and layer.layer_number is not None and _num_experts(layer) > 1
    }


def _similarity(layer: MoELayer) -> float:
    total: Tensor | None = None
    for vector in expert_vectors(layer):
        unit = vector / torch.linalg.vector_norm(vector)
        total = unit if total is None else total.add_(unit)
    assert total is not None
    torch.distributed.all_reduce(total, group=layer.ep_group)
    experts = _num_experts(layer)
    return float((total.square().sum() - experts) / (experts * (experts - 1)))


def _num_experts(layer: MoELayer) -> int:
    return layer.config.num_moe_experts or 1


def expert_vectors(layer: MoELayer) -> Iterator[Tensor]:
    """All weights of each local expert as one float64 vector, in the order of the local experts."""
    experts = layer.experts
    if hasattr(experts, "local_experts"):
        for expert in experts.local_experts:
            yield torch.cat([weight.double().flatten() for weight in expert.parameters()])
        return
    for index in range(layer.num_local_experts):
        weights = [getattr(linear, f"weight{index}") for linear in (experts.linear_fc1, experts.linear_fc2)]
        yield torch.cat([weight.double().flatten() for weight in weights])
