"""FLOPs, memory, time and plan of a model of dense and MoE layers, against its parts counted by hand."""

from dataclasses import replace

import pytest

from nemo_skymoe.architecture import Architecture
from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.pipeline import memory
from nemo_skymoe.pipeline.cost import CostModel
from nemo_skymoe.pipeline.efficiency import Efficiency
from nemo_skymoe.pipeline.flops import model_flops
from nemo_skymoe.pipeline.hardware import hardware_preset
from nemo_skymoe.pipeline.planner import best_layout
from nemo_skymoe.pipeline.planning import given_layout, plan
from nemo_skymoe.pipeline.simulator import simulate
from nemo_skymoe.pipeline.training import Training
from tests.pipeline.objective import estimate, exact_layout

SIZES = dict(num_layers=6, hidden_size=1024, num_attention_heads=16, vocab_size=32000)
PATTERN = (0, 1, 1, 0, 1, 1)
MIXED = Architecture(
    **SIZES, ffn_hidden_size=4096, num_moe_experts=8, moe_layer_freq=PATTERN, moe_ffn_hidden_size=1536
)
DENSE = Architecture(**SIZES, ffn_hidden_size=4096)
MOE = Architecture(**SIZES, ffn_hidden_size=1536, num_moe_experts=8)
TRAINING = Training(
    tensor_parallel=2, pipeline_parallel=2, expert_parallel=2, data_parallel=2, global_batch_size=16
)


def test_flops_of_a_token() -> None:
    """6 FLOPs a weight that the token meets, embedding not among them, and 12 of attention's width a position."""
    attention, head = 4 * 1024 * 1024, 32000 * 1024
    dense, expert, router = 3 * 1024 * 4096, 3 * 1024 * 1536, 8 * 1024
    weights = 6 * attention + 2 * dense + 4 * (2 * expert + router) + head
    assert model_flops(MIXED, 4096).total == 6 * weights + 12 * 6 * 1024 * 4096
    padded = 6 * attention + 2 * dense + 4 * (2 * 1.25 * expert + router) + head
    assert model_flops(MIXED, 4096, 1.25).total == 6 * padded + 12 * 6 * 1024 * 4096


def test_every_block_is_that_of_the_model_whose_layers_are_all_like_it() -> None:
    def blocks(model: Architecture) -> list:
        cost = CostModel(model, TRAINING, hardware_preset("A800-80G"), Efficiency())
        return list(cost.problem(80e9).blocks)

    mixed, dense, moe = map(blocks, (MIXED, DENSE, MOE))
    assert mixed[1:-1] == [(moe if is_moe else dense)[1] for is_moe in PATTERN]
    assert (mixed[0], mixed[-1]) == (dense[0], dense[-1])
    assert dense[1] != moe[1]
    with pytest.raises(ConfigurationError, match="layers of this model differ"):
        memory.layer_footprint(MIXED, TRAINING)


def test_the_tail_is_that_of_the_stage_with_most_to_reduce() -> None:
    def tail(model: Architecture) -> float:
        training = replace(TRAINING, overlap_grad_reduce=False)
        return CostModel(model, training, hardware_preset("A800-80G"), Efficiency()).tail()

    # Layers 0 to 2 and 3 to 5: one dense and two MoE each.
    three = (tail(DENSE) + 2 * tail(MOE)) / 3
    assert tail(MIXED) == pytest.approx(three, rel=1e-12)
    last = replace(MIXED, moe_layer_freq=(0, 0, 0, 1, 1, 1))
    assert tail(last) == pytest.approx(max(tail(DENSE), tail(MOE)), rel=1e-12)


def test_the_plan_is_as_good_as_brute_force() -> None:
    for pattern in (PATTERN, (0, 0, 0, 1, 1, 1), (1, 0, 0, 0, 0, 1)):
        cost = CostModel(
            replace(MIXED, moe_layer_freq=pattern), TRAINING, hardware_preset("A800-80G"), Efficiency()
        )
        problem = cost.problem(80e9)
        layouts = [given_layout(problem, [first, 6 - first]) for first in range(7)]
        shortest = min(simulate(layout).duration for layout in layouts)
        assert simulate(best_layout(problem)).duration <= 1.02 * shortest
        assert estimate(exact_layout(problem)) == pytest.approx(min(map(estimate, layouts)))


def test_what_a_plan_is_told() -> None:
    options = dict(
        num_gpus=8, tensor_parallel=2, pipeline_parallel=2, expert_parallel=2, global_batch_size=16
    )
    sizes = {**SIZES, "ffn_hidden_size": 4096, "num_moe_experts": 8, "moe_ffn_hidden_size": 1536}
    made = plan({**sizes, "moe_layer_freq": list(PATTERN)}, "A800-80G", **options)
    assert made.model == MIXED and sum(sum(stage.layers) for stage in made.stages) == 6
    second = plan({**sizes, "moe_layer_freq": 2}, "A800-80G", **options)
    assert second.model.moe_layers == (True, False) * 3
    with pytest.raises(ConfigurationError, match="moe_layer_freq is 0, expected n"):
        plan({**sizes, "moe_layer_freq": 0}, "A800-80G", **options)
    with pytest.raises(
        ConfigurationError, match=r"tensor_parallel is 4, expected a divisor of ffn_hidden_size \(4098\)"
    ):
        plan(
            {**sizes, "ffn_hidden_size": 4098, "moe_layer_freq": 2},
            "A800-80G",
            **options | {"tensor_parallel": 4, "pipeline_parallel": 1},
        )
    profile = {"layer": {"forward": 1.0}}
    with pytest.raises(ConfigurationError, match="profile has one layer for all, expected a list"):
        plan({**sizes, "moe_layer_freq": 2}, "A800-80G", profile=profile, **options)
    assert plan(
        {**sizes, "moe_layer_freq": 2}, "A800-80G", profile={"layer": [{"forward": 1.0}] * 6}, **options
    )
