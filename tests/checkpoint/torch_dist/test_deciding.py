"""Every option that decides what a model computes is compared, and all that differ are said at once."""

from dataclasses import replace
from typing import Any

import pytest
from torch.nn.functional import gelu, silu

from nemo_skymoe.architecture import Architecture
from nemo_skymoe.checkpoint.description import Description
from nemo_skymoe.checkpoint.torch_dist.deciding import DECIDING, check_deciding, differences
from nemo_skymoe.checkpoint.torch_dist.model_options import llama_options, model_options
from nemo_skymoe.config import ConfigurationError

DENSE = Architecture(4, 32, 64, 4, vocab_size=100, num_query_groups=2)
MOE = DENSE.with_experts(4)
# Another value for every option that a description or a family of models has.
OTHERS: dict[str, Any] = {
    "num_layers": 6, "hidden_size": 64, "moe_ffn_hidden_size": 96, "num_attention_heads": 8, "num_query_groups": 4,
    "kv_channels": 16, "num_moe_experts": 8, "rotary_base": 500_000, "seq_len_interpolation_factor": 2.0,
    "layernorm_epsilon": 1e-5, "share_embeddings_and_output_weights": True, "moe_router_topk": 1,
    "moe_router_logit_norm_scale": None, "moe_router_logit_norm_correction": 0, "moe_router_logit_norm_eps": 1e-3,
    "moe_layer_freq": [0, 1, 1, 1], "activation_func": gelu, "normalization": "LayerNorm",
    "position_embedding_type": "none", "rotary_percent": 0.5, "moe_router_score_function": "sigmoid",
    "yarn_rotary_scaling_factor": 4.0,
}  # fmt: skip


def saved(description: Description) -> dict[str, Any]:
    """What a converted checkpoint says of its model; names of functions are read as they are written."""
    options = llama_options() | model_options(description, 128)
    return options | {"activation_func": options["activation_func"]["_target_"]}


def wanted(**changes: Any) -> dict[str, Any]:
    """The options of a model that is configured by its own defaults, as NeMo's are, and not by a description's."""
    return {
        "num_layers": 4, "hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 4, "num_query_groups": 2,
        "kv_channels": None, "num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": None,
        "moe_layer_freq": [1, 1, 1, 1], "rotary_base": 10_000, "layernorm_epsilon": 1e-6, "activation_func": silu,
        "gated_linear_unit": True, "add_bias_linear": False, "normalization": "RMSNorm",
        "position_embedding_type": "rope", "share_embeddings_and_output_weights": False, "rotary_percent": 1.0,
        "moe_router_logit_norm_scale": 1.0, "seq_len_interpolation_factor": 1.0,
    } | changes  # fmt: skip


def test_one_model_in_two_spellings_has_no_differences() -> None:
    assert differences(saved(Description(MOE)), wanted()) == []
    dense = wanted(num_moe_experts=None, moe_router_topk=7, moe_ffn_hidden_size=9, moe_layer_freq=1)
    assert differences(saved(Description(DENSE)), dense) == []
    mixed = replace(MOE, moe_layer_freq=(0, 1, 0, 1), moe_ffn_hidden_size=48)
    assert differences(
        saved(Description(mixed)), wanted(moe_layer_freq=[0, 1, 0, 1], moe_ffn_hidden_size=48)
    ) == []  # fmt: skip


def test_every_option_is_compared() -> None:
    off = {option: not value for option, value in DECIDING.items() if value in (True, False)}
    numbers = {option: 3 for option, value in DECIDING.items() if value is None or value == 0}
    for option, value in (numbers | off | OTHERS).items():
        if option in ("ffn_hidden_size", "moe_layer_freq", "hidden_size") and option not in OTHERS:
            continue  # in a model of MoE layers it is the experts' size
        if option.startswith(("rope_scaling_", "yarn_")) and option not in OTHERS:
            continue  # without effect where nothing is scaled: the next tests have them
        other = wanted(**{"moe_layer_freq": 1, option: value})
        found = [each.option for each in differences(saved(Description(MOE)), other)]
        assert option in found, option
    assert set(OTHERS) <= set(DECIDING)


def test_the_scaling_of_the_rotary_embedding_is_compared() -> None:
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    llama = saved(Description(MOE, rope_scaling={**scaling, "original_max_position_embeddings": 8192}))
    assert differences(llama, wanted(rope_scaling=True)) == []
    assert differences(llama, wanted(scale_factor=8, old_context_len=8192)) == []  # as NeMo's Llama has it
    for options, option in (
        ({}, "rope_scaling"),
        ({"rope_scaling": True, "rope_scaling_factor": 32.0}, "rope_scaling_factor"),
        ({"rope_scaling": True, "rope_scaling_high_freq_factor": 5.0}, "rope_scaling_high_freq_factor"),
    ):
        assert [each.option for each in differences(llama, wanted(**options))] == [option]


def test_yarn_is_compared() -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    qwen = saved(Description(MOE, rope_scaling=scaling))
    same = {"yarn_rotary_scaling_factor": 4, "yarn_original_max_position_embeddings": 32768}
    assert differences(qwen, wanted(**same)) == []
    assert (
        differences(qwen, wanted(**same, position_embedding_type="yarn", yarn_mscale=None)) == []
    )  # stock Bridge's
    assert [each.option for each in differences(saved(Description(MOE)), wanted(**same))] == [
        "yarn_rotary_scaling_factor"
    ]
    for options, option in (
        ({}, "yarn_rotary_scaling_factor"),
        (same | {"yarn_rotary_scaling_factor": 8.0}, "yarn_rotary_scaling_factor"),
        (same | {"yarn_original_max_position_embeddings": 4096}, "yarn_original_max_position_embeddings"),
        (same | {"yarn_beta_fast": 24.0}, "yarn_beta_fast"),
        (same | {"yarn_beta_slow": 2.0}, "yarn_beta_slow"),
        (same | {"yarn_mscale": 0.5}, "yarn_mscale"),
        (same | {"yarn_mscale_all_dim": 1.0}, "yarn_mscale"),
        (same | {"yarn_correction_range_round_to_int": False}, "yarn_correction_range_round_to_int"),
    ):
        assert [each.option for each in differences(qwen, wanted(**options))] == [option], options


def test_all_differences_are_said_at_once() -> None:
    llama = Description(replace(MOE, tied_embeddings=True), rope_theta=5e5, rms_norm_eps=1e-5)
    with pytest.raises(ConfigurationError) as refused:
        check_deciding(saved(llama), wanted(), None, "folder", "model.config.{}".format)
    said = str(refused.value)
    assert "\n" not in said and "'folder'" in said
    for part in (
        "model.config.rotary_base is 10000, expected 500000",
        "model.config.layernorm_epsilon is 1e-06, expected 1e-05",
        "model.config.share_embeddings_and_output_weights is False, expected True",
        "belongs in model.config.differs_from_checkpoint",
    ):
        assert part in said


def test_what_differs_on_purpose_is_named() -> None:
    llama = saved(Description(MOE, rope_theta=5e5, rms_norm_eps=1e-5))
    check_deciding(llama, wanted(), ["rotary_base", "layernorm_epsilon"], "folder")
    with pytest.raises(ConfigurationError, match="layernorm_epsilon is 1e-06") as refused:
        check_deciding(llama, wanted(), ["rotary_base"], "folder")
    assert "rotary_base is" not in str(refused.value)
    for changes, message in (
        (["rotary_bse"], "differs_from_checkpoint rotary_bse is unknown: did you mean rotary_base"),
        ("rotary_base", "differs_from_checkpoint is 'rotary_base', expected a list"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            check_deciding(llama, wanted(), changes, "folder")
