"""What a Llama's or Qwen's attention has, in parallel: biases, norms of heads, their size and groups, and scaled RoPE."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import attention
from torch import Tensor

from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.moe.layer import SkyworkTransformerConfig, get_skywork_block_spec
from nemo_skymoe.moe.rotary import scale_rotary_embedding
from nemo_skymoe.ranks import run_ranks
from nemo_skymoe.rotary_options import RotaryOptions
from tests.moe import edp_worlds
from tests.moe.worlds import (
    LENGTH,
    VOCABULARY,
    Layout,
    Training,
    configuration,
    groups,
    relative_errors,
    spreads_key_value_heads,
)

MULTIPLIES = hasattr(attention, "_yarn_get_concentration_factor_from_config")
ATTENTION: dict[str, Any] = {
    "add_qkv_bias": True,
    "qk_layernorm": True,
    "num_query_groups": 2,
    "kv_channels": 6,
}
YARN = {"yarn_rotary_scaling_factor": 4.0, "yarn_original_max_position_embeddings": 8, "yarn_beta_fast": 2.0}
YARN |= {"yarn_beta_slow": 0.2, "yarn_mscale": 1.0 if MULTIPLIES else 0.0}
LLAMA3 = {"rope_scaling": True, "rope_scaling_original_max_position_embeddings": 8}
SCALINGS: dict[str, dict[str, Any]] = {"yarn": YARN, "llama3": LLAMA3, "none": {}}
DENSE, MOE = {"num_moe_experts": None}, {"num_moe_experts": 4}
EDP = MOE | {"moe_edp": True}
LAYOUTS: list[tuple[Layout, dict[str, Any]]] = [
    (Layout(tp=2, sp=False), DENSE),
    (Layout(tp=2, sp=True), DENSE),
    (Layout(tp=2, sp=True), MOE),
    (Layout(tp=2, ep=2, sp=False), EDP | {"edp_dispatcher": "replicated"}),
    (Layout(tp=2, ep=2, sp=True), EDP | {"edp_dispatcher": "alltoall"}),
]


@dataclass
class Config(RotaryOptions, SkyworkTransformerConfig):
    """As both front doors mix them."""


class WithAttention(Training):
    """The world of MoE layers, with Megatron's attention between them."""

    config_class = Config
    mask = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool).triu(1)

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        for chunk in self.chunks:
            for name, parameter in chunk.named_parameters():
                if name.endswith("linear_qkv.bias"):
                    parameter.data.mul_(0.1)  # larger ones make tokens alike, and leave experts without any

    @staticmethod
    def make_chunk(config: Any, stage: int | None) -> GPTModel:
        model = GPTModel(
            config,
            get_skywork_block_spec(config, stage),  # type: ignore[arg-type]
            VOCABULARY,
            LENGTH,
            pre_process=parallel_state.is_pipeline_first_stage(),
            post_process=parallel_state.is_pipeline_last_stage(),
            position_embedding_type="rope",
            share_embeddings_and_output_weights=False,
        )
        scale_rotary_embedding(model, config)
        return model


def gradients(cases: list[tuple[Layout, dict[str, Any]]]) -> list[dict[str, Tensor]]:
    edp_worlds.start_world()
    found = []
    for layout, options in cases:
        with groups(layout):
            training = WithAttention(layout, **ATTENTION | options)
            training.run()
            found.append(training.gradients())
    return found


def test_ranks_that_share_a_key_value_head() -> None:
    """From Megatron-Core 0.16 on. Before, its configuration refuses them."""
    one_head = {"num_query_groups": 1, **YARN}
    if not spreads_key_value_heads():
        with pytest.raises(
            ConfigurationError, match=r"num_query_groups \(1\) must be a multiple of tensor_model"
        ):
            configuration(Layout(tp=2), Config, **ATTENTION | MOE | one_head)
        return
    [[dense, moe]] = run_ranks(gradients, 1, [(Layout(), model | one_head) for model in (DENSE, MOE)])
    found = run_ranks(gradients, 2, [(layout, options | one_head) for layout, options in LAYOUTS])[0]
    for (layout, options), gradient in zip(LAYOUTS, found, strict=True):
        errors = relative_errors(gradient, dense if options == DENSE else moe)
        assert {name: error for name, error in errors.items() if not error <= 1e-10} == {}, (layout, options)


def test_gradients_are_those_of_one_rank() -> None:
    """Of every parameter, under plain tensor parallelism and under EDP, with both scalings of the frequencies."""
    [one] = run_ranks(
        gradients, 1, [(Layout(), model | scaling) for model in (DENSE, MOE) for scaling in SCALINGS.values()]
    )
    dense, moe = (dict(zip(SCALINGS, some, strict=True)) for some in (one[:3], one[3:]))
    new = {name.rpartition("self_attention.")[2] for name in one[0]}
    assert all(gradient.norm() > 0 for found in one for gradient in found.values())
    assert {"linear_qkv.bias", "q_layernorm.weight", "k_layernorm.weight"} <= new
    for scaling in ("yarn", "llama3"):  # where it did nothing, its cases would prove nothing
        assert max(relative_errors(dense[scaling], dense["none"]).values()) > 1e-3
    cases = [(layout, options, name) for layout, options in LAYOUTS for name in ("yarn", "llama3")]
    asked = [(layout, options | SCALINGS[name]) for layout, options, name in cases]
    for (layout, options, name), found in zip(
        cases, run_ranks(gradients, 2, asked, timeout=600)[0], strict=True
    ):
        errors = relative_errors(found, (dense if options == DENSE else moe)[name])
        assert {name: error for name, error in errors.items() if not error <= 1e-10} == {}, (layout, options)
