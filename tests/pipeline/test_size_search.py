"""The search for parallel sizes, against planning every combination; and what context parallelism costs, by hand."""

from dataclasses import replace
from itertools import product

import pytest

from nemo_skymoe.architecture import SKYWORK_13B, SKYWORK_MOE_146B, Architecture
from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.pipeline.cost import CostModel
from nemo_skymoe.pipeline.efficiency import Efficiency
from nemo_skymoe.pipeline.hardware import A800_80G, H100
from nemo_skymoe.pipeline.memory import layer_footprint
from nemo_skymoe.pipeline.planning import Question, plan
from nemo_skymoe.pipeline.size_search import search
from nemo_skymoe.pipeline.training import Training

DENSE = Architecture(6, 4096, 11008, 32, vocab_size=32000, num_query_groups=8)
MOE = Architecture(6, 2048, 4096, 16, vocab_size=32000, num_moe_experts=8)
SIZES = {
    "tensor_parallel": (1, 2, 4, 8),
    "context_parallel": (1, 2, 4),
    "pipeline_parallel": (1, 2, 4, 8),
    "virtual_pipeline": (1, 2, 3, 4),
    "expert_parallel": (1, 2, 4, 8),
    "micro_batch_size": (1, 2, 4, 8),
}
FIXED = {"seq_length": 4096, "global_batch_size": 16}


@pytest.mark.parametrize(("model", "limit"), [(DENSE, 14e9), (MOE, 8e9)], ids=["dense", "moe"])
def test_the_best_are_those_of_all_combinations(model: Architecture, limit: float):
    """On 8 GPUs whose memory is short, so that many do not fit, and two of the best of the MoE recompute."""
    found = search(Question(model, H100, memory_limit=limit), 8, FIXED)
    steps = []
    for values in product(*SIZES.values()):
        sizes = dict(zip(SIZES, values, strict=True))
        if model.num_moe_experts and sizes["expert_parallel"] < sizes["tensor_parallel"]:
            continue
        try:
            made = plan(model, H100, num_gpus=8, memory_limit=limit, **FIXED, **sizes)
        except ConfigurationError:
            continue
        steps.append(made.step_time)
    assert [one.step_time for one in found.plans] == pytest.approx(sorted(steps)[:10], rel=1e-9)
    assert found.planned < found.combinations
    assert any(sum(map(sum, one.recompute)) for one in found.plans) == (model is MOE)


def test_a_given_size_is_kept_and_the_rest_is_searched():
    fixed = {"seq_length": 8192, "global_batch_size": 2048, "capacity_factor": 1.25}
    given = {"tensor_parallel": 4, "expert_parallel": 4, "pipeline_parallel": 12, "context_parallel": 1}
    found = search(Question(SKYWORK_MOE_146B, A800_80G), 1536, {**fixed, **given}, best=3)
    assert [one.step_time for one in found.plans] == sorted(one.step_time for one in found.plans)
    for one in found.plans:
        assert {name: getattr(one.training, name) for name in given} == given
    assert len({(one.training.virtual_pipeline, one.training.micro_batch_size) for one in found.plans}) == 3


def test_what_cannot_be_is_refused():
    question = Question(SKYWORK_13B, A800_80G)
    batch = {"seq_length": 4096, "global_batch_size": 512}
    with pytest.raises(ConfigurationError, match="no layout of 64 GPUs is possible"):
        search(question, 64, {**batch, "tensor_parallel": 5})
    with pytest.raises(
        ConfigurationError, match=r"none of the 4 possible layouts of 1 GPUs fits in 80\.0 GB"
    ):
        search(question, 1, batch)


def test_context_parallelism_halves_the_tokens_and_shards_the_optimizer_further():
    alone = Training(
        tensor_parallel=2, sequence_parallel=True, data_parallel=4, seq_length=8192, global_batch_size=8
    )
    shared = replace(alone, context_parallel=2, data_parallel=2, seq_length=16384)
    assert (alone.tokens, alone.num_gpus, alone.stage_gpus) == (
        shared.tokens,
        shared.num_gpus,
        shared.stage_gpus,
    )
    assert layer_footprint(SKYWORK_13B, alone) == layer_footprint(SKYWORK_13B, shared)


def test_keys_and_values_travel_behind_attention():
    """A ring of two: each rank sends its keys and values once, and in the backward pass their gradients too."""
    training = Training(context_parallel=2, data_parallel=1, seq_length=8192, global_batch_size=1)
    slow = replace(A800_80G, nvlink=1e6)
    cost = CostModel(SKYWORK_13B, training, slow, Efficiency())
    sent = 2 * 2 * SKYWORK_13B.hidden_size * 4096
    travel = sent / (1e6 * cost.efficiency.links)
    product = SKYWORK_13B.hidden_size * 8192 * 4096
    compute = A800_80G.peak_flops * cost.efficiency.compute
    fast = CostModel(SKYWORK_13B, training, replace(slow, nvlink=1e15), Efficiency()).layer()
    assert cost.layer().forward - fast.forward == pytest.approx(travel - 2 * product / compute)
    assert cost.layer().backward - fast.backward == pytest.approx(2 * travel - 5 * product / compute)


def test_a_sequence_that_context_ranks_cannot_share_is_refused():
    with pytest.raises(
        ConfigurationError, match="seq_length is 4098, expected a multiple of 2 x context_parallel"
    ):
        Training(context_parallel=2, seq_length=4098)
