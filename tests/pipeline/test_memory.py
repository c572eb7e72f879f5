"""Bytes of the report's 146B model and of Skywork-13B, against sums by hand."""

from dataclasses import replace
from itertools import pairwise

import pytest

from nemo_skymoe.architecture import SKYWORK_13B, SKYWORK_MOE_146B, Architecture
from nemo_skymoe.pipeline import memory
from nemo_skymoe.pipeline.training import Training
from tests.cases import every

H, F, S = 4608, 12288, 8192
REPORT = Training(
    tensor_parallel=4,
    sequence_parallel=True,
    expert_parallel=4,
    pipeline_parallel=12,
    data_parallel=32,
    global_batch_size=2048,
    seq_length=S,
    pad_to_capacity=True,
)
DENSE = Training(pipeline_parallel=2, data_parallel=256, global_batch_size=4096)


@every("model", [SKYWORK_13B, SKYWORK_MOE_146B])
def test_parameters_on_one_gpu_without_parallelism_are_the_models(model: Architecture):
    model = replace(model, vocab_size=65536)
    dense, expert = memory.layer_parameters(model, Training())
    total = model.num_layers * (dense + expert) + 2 * memory.vocabulary_parameters(model, Training())
    assert total + model.hidden_size == model.parameters


@every(("tensor", "rows"), [(1, 65536), (2, 65536), (8, 65536), (3, 65664)])
def test_the_vocabulary_is_padded_as_megatron_does(tensor: int, rows: int):
    assert memory.padded_vocabulary(SKYWORK_13B, Training(tensor_parallel=tensor)) == rows


def test_a_layer_of_the_report_holds_four_experts_a_gpu():
    dense, expert = memory.layer_parameters(SKYWORK_MOE_146B, REPORT)
    assert expert == 4 * 3 * H * F
    assert dense + expert == pytest.approx(0.7007e9, rel=1e-3)


@every(("layers", "gradient_bytes", "gigabytes"), [(4, 4, 17.9), (5, 4, 22.3), (4, 2, 12.3), (5, 2, 15.3)])
def test_weights_of_the_reports_stages(layers: int, gradient_bytes: int, gigabytes: float):
    training = replace(REPORT, gradient_bytes=gradient_bytes)
    weights = layers * memory.layer_footprint(SKYWORK_MOE_146B, training).weights
    assert weights / 1e9 == pytest.approx(gigabytes, abs=0.06)


@every(("layers", "gigabytes"), [(4, 50.5), (5, 63.1)])
def test_weights_of_the_reports_stages_without_a_distributed_optimizer(layers: int, gigabytes: float):
    training = replace(REPORT, distributed_optimizer=False)
    weights = layers * memory.layer_footprint(SKYWORK_MOE_146B, training).weights
    assert weights / 1e9 == pytest.approx(gigabytes, abs=0.06)


def test_expert_state_is_split_over_the_ranks_with_the_same_experts():
    wide = replace(REPORT, expert_parallel=16)  # four data-parallel ranks share a set of experts
    dense, expert = memory.layer_parameters(SKYWORK_MOE_146B, wide)
    assert expert == 3 * H * F
    assert wide.expert_data_parallel == 8
    state = memory.layer_footprint(SKYWORK_MOE_146B, wide).weights
    assert state == pytest.approx((6 + 12 / 32) * dense + (6 + 12 / 8) * expert)


def test_activations_of_a_dense_layer_are_16h_and_6f_a_token():
    """Korthikanti et al. with FlashAttention, SwiGLU and no dropout; 4 bytes a head for the log-sum-exp."""
    expected = 4096 * (16 * H + 6 * F + 4 * 36)
    assert memory.layer_footprint(SKYWORK_13B, DENSE).activations == expected


def test_tensor_parallelism_splits_all_activations_only_with_sequence_parallelism():
    whole = memory.layer_footprint(SKYWORK_13B, DENSE)
    split = replace(DENSE, tensor_parallel=4, data_parallel=64)
    alone = memory.layer_footprint(SKYWORK_13B, split)
    both = memory.layer_footprint(SKYWORK_13B, replace(split, sequence_parallel=True))
    assert both.activations == whole.activations / 4
    assert alone.activations == (whole.activations - 8 * H * 4096) / 4 + 8 * H * 4096
    assert (alone.checkpoint, both.checkpoint) == (2 * H * 4096, 2 * H * 4096 / 4)


@every("capacity", [1.0, 1.25])
def test_activations_of_an_moe_layer(capacity: float):
    training = replace(REPORT, capacity_factor=capacity)
    attention = S * (16 * H + 4 * 36) / 4
    router = S / 4 * 16 * 9
    experts = S / 4 * 2 * capacity * (2 * H + 6 * F)
    found = memory.layer_footprint(SKYWORK_MOE_146B, training)
    assert found.activations == pytest.approx(attention + router + experts)


def test_unpadded_experts_compute_no_empty_places():
    def tokens(**options) -> float:
        return memory.expert_tokens(SKYWORK_MOE_146B, replace(REPORT, **options))

    assert tokens() == tokens(capacity_factor=1.25, pad_to_capacity=False) == 2 * S / 4
    assert tokens(capacity_factor=1.25) == 1.25 * 2 * S / 4
    assert tokens(capacity_factor=0.5, pad_to_capacity=False) == 0.5 * 2 * S / 4


def test_recomputation_keeps_a_sixteenth_of_a_layer():
    layer = memory.layer_footprint(SKYWORK_13B, DENSE)
    assert layer.checkpoint == 2 * H * 4096 < layer.activations / 15


@every("model", [SKYWORK_13B, SKYWORK_MOE_146B])
@every("block", [memory.embedding_footprint, memory.layer_footprint, memory.head_footprint])
def test_more_tensor_parallelism_never_takes_more_memory(model: Architecture, block):
    experts = 4 if model.num_moe_experts else 1
    found = [
        block(
            model,
            Training(
                tensor_parallel=tensor,
                sequence_parallel=True,
                expert_parallel=experts,
                data_parallel=128 // tensor,
                global_batch_size=128,
            ),
        )
        for tensor in (1, 2, 4)
    ]
    for more, less in pairwise(found):
        assert less.activations <= more.activations
        assert less.working <= more.working
        # The optimizer state is split over data x tensor ranks either way.
        assert less.weights < more.weights
