"""Expert similarity against all pairs of whole experts."""

import itertools
from typing import Any
from unittest import mock

import pytest
import torch
from megatron.core import parallel_state, tensor_parallel

from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.moe.similarity import expert_similarity
from tests.cases import every
from tests.moe.worlds import (
    Layout,
    build,
    configuration,
    generator,
    groups,
    model_chunk,
    on_ranks,
    parameters,
    weight,
)


def pairwise(vectors: list[torch.Tensor]) -> float:
    """Mean cosine over all pairs, one pair at a time."""
    cosines = [torch.cosine_similarity(a, b, dim=0).item() for a, b in itertools.combinations(vectors, 2)]
    return sum(cosines) / len(cosines)


def whole_experts(layer: int) -> list[torch.Tensor]:
    """The experts that `build` gives every layout, in full size."""
    with groups():
        named = parameters(build(configuration()))
    prefix = f"decoder.layers.{layer}.mlp.experts.local_experts."
    return [
        torch.cat(
            [p.detach().flatten() for name, p in named.items() if name.startswith(f"{prefix}{expert}.")]
        )
        for expert in range(8)
    ]


@on_ranks(1)
def test_one_rank() -> None:
    expected = {layer: pairwise(whole_experts(layer)) for layer in (1, 2)}
    with groups():
        assert expert_similarity(build(configuration())) == pytest.approx(expected, rel=1e-9)
    assert expected[1] != expected[2]


@on_ranks(2)
def test_over_expert_and_pipeline_ranks_with_one_reduction_a_layer() -> None:
    expected = [pairwise(whole_experts(layer)) for layer in (1, 2)]
    with groups(Layout(ep=2)):
        chunks = build(configuration(Layout(ep=2)))
        with mock.patch.object(torch.distributed, "all_reduce", wraps=torch.distributed.all_reduce) as reduce:
            found = expert_similarity(chunks)
        assert found == pytest.approx({1: expected[0], 2: expected[1]}, rel=1e-9)
        sizes = [call.args[0].numel() for call in reduce.call_args_list]
        assert sizes == [whole_experts_size()] * 2
    with groups(Layout(pp=2)):
        found = expert_similarity(build(configuration(Layout(pp=2))))
        layer = torch.distributed.get_rank() + 1
        assert found == pytest.approx({layer: expected[layer - 1]}, rel=1e-9)


def whole_experts_size() -> int:
    return 2 * 24 * 16 + 16 * 24


@on_ranks(2)
def test_experts_split_over_tensor_ranks() -> None:
    """Two halves of each expert on two ranks are the expert."""
    expected = pairwise(whole_experts(1))
    parallel_state.initialize_model_parallel(2, expert_tensor_parallel_size=2)
    tensor_parallel.model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    chunk = model_chunk(configuration(Layout(tp=2), expert_tensor_parallel_size=2))
    for name, parameter in parameters([chunk]).items():
        if "local_experts" in name:
            shape, dimension = list(parameter.shape), 0 if "linear_fc1" in name else 1
            shape[dimension] *= 2
            halves = weight(name, tuple(shape)).chunk(2, dim=dimension)
            parameter.data.copy_(halves[torch.distributed.get_rank()])
    assert expert_similarity([chunk])[1] == pytest.approx(expected, rel=1e-9)


@every("dtype", [torch.bfloat16, torch.float32, torch.float64])
@on_ranks(1)
def test_copies_have_similarity_one_and_random_experts_none(dtype: torch.dtype) -> None:
    with groups():
        chunks = build(configuration(params_dtype=dtype, hidden_size=64, ffn_hidden_size=128))
        assert abs(expert_similarity(chunks)[1]) < 0.01
        for layer in chunks[0].decoder.layers:
            experts = layer.mlp.experts.local_experts
            for expert in experts[1:]:
                expert.load_state_dict(experts[0].state_dict())
        found = expert_similarity(chunks)
        assert found == pytest.approx({1: 1.0, 2: 1.0}, abs=1e-6)
        noise = torch.randn(64, 128, generator=generator("noise")) * 0.05
        chunks[0].decoder.layers[0].mlp.experts.local_experts[0].linear_fc2.weight.data += noise.to(dtype)
        assert expert_similarity(chunks)[1] < found[1] - 1e-4


@on_ranks(1)
def test_one_expert_has_none() -> None:
    with groups():
        config = configuration(moe_router_topk=1, moe_router_pre_softmax=True)
        config.num_moe_experts = 1  # which the options refuse: its router has nothing to learn
        assert expert_similarity(build(config)) == {}


@on_ranks(1)
def test_grouped_experts_of_transformer_engine() -> None:
    """Their weights are numbered attributes; the class itself needs a GPU."""
    with groups():
        chunks = build(configuration())
        expected = expert_similarity(chunks)
        for layer in chunks[0].decoder.layers:
            layer.mlp.experts = grouped(layer.mlp.experts)
        assert expert_similarity(chunks) == pytest.approx(expected, rel=1e-12)
        chunks[0].decoder.layers[0].mlp.experts = torch.nn.Identity()
        with pytest.raises(ConfigurationError, match="SequentialMLP and TEGroupedMLP, not of Identity"):
            expert_similarity(chunks)


def grouped(sequential: Any) -> torch.nn.Module:
    module = torch.nn.Module()
    for name in ("linear_fc1", "linear_fc2"):
        linear = torch.nn.Module()
        for index, expert in enumerate(sequential.local_experts):
            linear.register_parameter(f"weight{index}", getattr(expert, name).weight)
        module.add_module(name, linear)
    return module
