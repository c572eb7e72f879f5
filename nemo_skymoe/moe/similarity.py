"""Expert similarity (sec. 3.2) measures how far the experts of a layer have diverged from their common origin."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor

from nemo_skymoe.config import ConfigurationError


@torch.no_grad()
def expert_similarity(model_chunks: Sequence[torch.nn.Module]) -> dict[int, float]:
    """Compute the mean cosine over all pairs of experts of each layer, by global layer number.

    An expert is the vector of all its weights. If s is the squared length of the sum of E experts' unit vectors, the
    mean over ordered pairs is (s - E) / (E (E - 1)). For each layer this takes one reduction of one expert's size over
    the expert-parallel group. The mean is 1 after upcycling by copies, and about 0 from scratch.

    Raises:
        ConfigurationError: The layer's experts are of a class whose weights this function does not know.
    """
    return {
        layer.layer_number: _similarity(layer)
        for chunk in model_chunks
        for layer in chunk.modules()
        if isinstance(layer, MoELayer) and layer.layer_number is not None and _num_experts(layer) > 1
    }


def _similarity(layer: MoELayer) -> float:
    experts = _num_experts(layer)
    lengths = _add_over_tensor_ranks(
        torch.stack([_squares(expert) for expert in expert_weights(layer)])
    ).sqrt()
    total: Tensor | None = None
    for weights, length in zip(expert_weights(layer), lengths, strict=True):
        vector = torch.cat([_accurate(weight).flatten() for weight in weights]).div_(length)
        total = vector if total is None else total.add_(vector)
    assert total is not None
    torch.distributed.all_reduce(total, group=layer.ep_group)
    square = _add_over_tensor_ranks(_squares([total]).reshape(1))
    return float((square - experts) / (experts * (experts - 1)))


def _num_experts(layer: MoELayer) -> int:
    return layer.config.num_moe_experts or 1


def _accurate(weight: Tensor) -> Tensor:
    return weight if weight.dtype == torch.float64 else weight.float()


def _squares(tensors: Sequence[Tensor]) -> Tensor:
    """Sum all squares in float64, with which the similarity of copies is 1 to within 1e-6."""
    norms = [torch.linalg.vector_norm(tensor, dtype=torch.float64) for tensor in tensors]
    return torch.stack(norms).square().sum()


def _add_over_tensor_ranks(partial: Tensor) -> Tensor:
    """Sum over the ranks that each hold a part of every expert. Under EDP a rank holds whole experts."""
    group: Any = parallel_state.get_expert_tensor_parallel_group()
    if group.size() > 1:
        torch.distributed.all_reduce(partial, group=group)
    return partial


def expert_weights(layer: MoELayer) -> Iterator[list[Tensor]]:
    """Yield the weight tensors of each local expert, in the order of the local experts."""
    experts: Any = layer.experts
    for index in range(layer.num_local_experts):
        if hasattr(experts, "local_experts"):
            yield list(experts.local_experts[index].parameters())
        elif hasattr(getattr(experts, "linear_fc1", None), f"weight{index}"):
            yield [getattr(linear, f"weight{index}") for linear in (experts.linear_fc1, experts.linear_fc2)]
        else:
            raise ConfigurationError(
                f"expert similarity knows the weights of SequentialMLP and TEGroupedMLP, not of"
                f" {type(experts).__name__}"
            )
