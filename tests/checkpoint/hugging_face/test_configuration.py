"""config.json as a description: what is read, what is logged, and what is refused by name."""

import json
import logging
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    AutoConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from nemo_skymoe.architecture import Architecture
from nemo_skymoe.checkpoint import rope
from nemo_skymoe.checkpoint.hugging_face.configuration import from_hf_config, read
from nemo_skymoe.config import ConfigurationError
from tests.checkpoint import hf_models

SIZES = Architecture(2, 64, 96, 4, hf_models.VOCAB_SIZE)
DENSE = hf_models.SIZES | hf_models.SKYWORK
MOE = DENSE | hf_models.SKYWORK_MOE
MISTRAL = {"architectures": ["MistralForCausalLM"], **hf_models.SIZES}


def test_dense_skywork():
    description = from_hf_config(DENSE | {"vocab_size": 65519, "rope_theta": 5e5, "rms_norm_eps": 1e-5})
    assert description.architecture == Architecture(2, 64, 96, 4, vocab_size=65519)
    assert (description.family, description.rope_theta, description.rms_norm_eps) == ("skywork", 5e5, 1e-5)
    assert (description.bos_token_id, description.eos_token_id, description.pad_token_id) == (1, 2, None)


@pytest.mark.parametrize(
    "experts",
    [
        {"num_experts": [16]},
        {"num_experts": 16},
        {"num_experts": [16, 16]},
        {"num_experts": None, "num_local_experts": 16},
        {"num_experts": [16], "num_local_experts": 16},
    ],
    ids=str,
)
def test_experts_tell_a_moe_from_a_dense_model_of_the_same_class(experts: dict[str, Any]):
    description = from_hf_config(DENSE | experts | {"num_experts_per_tok": 3})
    assert description.architecture.num_moe_experts == 16
    assert description.architecture.moe_router_topk == 3


@pytest.mark.parametrize("none", [None, [], 0, [0]], ids=str)
def test_no_experts_are_a_dense_model(none: Any):
    assert from_hf_config(DENSE | {"num_experts": none}).architecture == SIZES


@pytest.mark.parametrize(
    ("gate", "scale"),
    [
        ({}, 1.0),
        ({"moe_gate_norm_std": 2}, 2.0),
        ({"moe_use_logits_norm": False}, None),
        ({"moe_use_mixtral_gating": True, "moe_feature_no_mul_topk": False}, 1.0),
    ],
    ids=str,
)
def test_gate(gate: dict[str, Any], scale: float | None):
    description = from_hf_config(MOE | gate)
    assert description.moe_router_logit_norm_scale == scale
    assert description.moe_router_logit_norm_correction == 1


def test_silent_moe_is_the_released_one_and_says_so(caplog: pytest.LogCaptureFixture):
    silent = {name: value for name, value in MOE.items() if not name.startswith("moe_")}
    assert from_hf_config(silent).moe_router_logit_norm_scale == 1.0
    for name in hf_models.SKYWORK_MOE.keys() - {"num_experts"}:
        assert f"config.json has no {name}: taken to be" in caplog.text


def test_values_are_logged_and_unknown_ones_louder(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    from_hf_config(MOE | {"rope_theta": 1e6, "moe_secret": 7})
    levels = {record.getMessage(): record.levelname for record in caplog.records}
    assert levels["config.json: rope_theta is 1000000.0"] == "INFO"
    assert levels["config.json: num_experts is [4]"] == "INFO"
    assert levels["config.json: moe_secret is 7, which is unknown here and not used"] == "WARNING"


@pytest.mark.parametrize(
    ("config", "architecture"),
    [
        (LlamaConfig(**hf_models.SIZES), SIZES),
        (
            LlamaConfig(**hf_models.SIZES, num_key_value_heads=2, tie_word_embeddings=True),
            Architecture(2, 64, 96, 4, hf_models.VOCAB_SIZE, num_query_groups=2, tied_embeddings=True),
        ),
        (
            MistralConfig(**hf_models.SIZES, num_key_value_heads=1, head_dim=32, sliding_window=None),
            Architecture(2, 64, 96, 4, hf_models.VOCAB_SIZE, num_query_groups=1, kv_channels=32),
        ),
        (
            Qwen2Config(**hf_models.SIZES, num_key_value_heads=2),
            Architecture(2, 64, 96, 4, hf_models.VOCAB_SIZE, num_query_groups=2, add_qkv_bias=True),
        ),
        (
            Qwen3Config(**hf_models.SIZES, num_key_value_heads=2),
            Architecture(
                2, 64, 96, 4, hf_models.VOCAB_SIZE, num_query_groups=2, kv_channels=128, qk_layernorm=True
            ),
        ),
    ],
    ids=["llama", "tied", "mistral", "qwen2", "qwen3"],
)
def test_what_transformers_saves(config: Any, architecture: Architecture, tmp_path: Path):
    config.architectures = [type(config).__name__.replace("Config", "ForCausalLM")]
    config.save_pretrained(tmp_path)
    assert read(tmp_path).architecture == architecture


KINDS = [LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config, MixtralConfig, Qwen3MoeConfig]


@pytest.mark.parametrize("kind", KINDS)
def test_absent_values_are_those_of_transformers(kind: Any):
    """Both read the same file with nothing in it but the sizes that have no meaningful default."""
    sizes = {name: value for name, value in hf_models.SIZES.items() if name != "max_position_embeddings"}
    sizes |= {"num_attention_heads": 32, "sliding_window": 10**9}
    if kind is Qwen3MoeConfig:  # whose default has no place here
        sizes["norm_topk_prob"] = True
    theirs = kind(**sizes)
    ours = from_hf_config({"architectures": [kind.__name__.replace("Config", "ForCausalLM")], **sizes})
    assert ours.max_position_embeddings == theirs.max_position_embeddings
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.rope_theta == hf_models.rope_theta(theirs)
    assert ours.architecture.query_groups == theirs.num_key_value_heads
    experts = getattr(theirs, "num_local_experts", getattr(theirs, "num_experts", None))
    assert ours.architecture.num_moe_experts == experts
    if experts is not None:
        size = getattr(theirs, "moe_intermediate_size", theirs.intermediate_size)
        assert ours.architecture.expert_ffn_hidden_size == size
        assert ours.architecture.moe_router_topk == theirs.num_experts_per_tok
        assert ours.moe_router_logit_norm_scale is None
    assert ours.architecture.head_size == (getattr(theirs, "head_dim", None) or 64 // 32)
    assert ours.architecture.tied_embeddings == theirs.tie_word_embeddings


def test_ntk_scaling_multiplies_theta_and_nothing_else():
    description = from_hf_config(DENSE | {"rope_theta": 1e4, "rope_scaling": {"type": "ntk", "factor": 8.0}})
    assert (description.rope_theta, description.rope_scaling) == (8e4, None)


def test_linear_scaling_is_megatrons_interpolation():
    description = from_hf_config(DENSE | {"rope_scaling": {"type": "linear", "factor": 2.0}})
    assert description.rope_scaling == {"rope_type": "linear", "factor": 2.0}
    assert rope.megatron_options(description.rope_scaling)["seq_len_interpolation_factor"] == 2.0


YARN = {"type": "yarn", "factor": 4.0}
FILLED = {"rope_type": "yarn", "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0}


def test_yarn_is_read_as_transformers_reads_it():
    """One form for one function: what is absent is filled in, and what has no effect is left out."""
    length = DENSE["max_position_embeddings"]
    for fields, expected in (
        ({}, {"original_max_position_embeddings": length}),
        ({"original_max_position_embeddings": 64, "beta_fast": None, "finetuned": True}, {}),
        ({"original_max_position_embeddings": 64, "mscale": 0.5}, {}),
        ({"original_max_position_embeddings": 64, "attention_factor": 0.1 * math.log(4.0) + 1.0}, {}),
        (
            {"original_max_position_embeddings": 64, "mscale": 2, "mscale_all_dim": 2},
            {"attention_factor": 1.0},
        ),
        ({"original_max_position_embeddings": 64, "attention_factor": 1.4}, {"attention_factor": 1.4}),
        (
            {"original_max_position_embeddings": 64, "truncate": False, "beta_slow": 2},
            {"truncate": False, "beta_slow": 2.0},
        ),
    ):
        filled = FILLED | {"original_max_position_embeddings": 64} | expected
        description = from_hf_config(DENSE | {"rope_scaling": YARN | fields})
        assert description.rope_scaling == filled, fields
        assert rope.scaling_of(rope.megatron_options(description.rope_scaling)) == filled
    new = {name: value for name, value in DENSE.items() if not name.startswith("rope_")}
    inside = YARN | {"rope_theta": 5e4, "original_max_position_embeddings": 64}
    assert from_hf_config(new | {"rope_parameters": inside}).rope_scaling == FILLED | {
        "original_max_position_embeddings": 64
    }


def test_yarn_that_megatron_cannot_express_is_refused_by_its_field():
    """On the way to Megatron; from Hugging Face's form to the same it passes as it is."""
    for fields, message in (
        ({"factor": None}, "factor is None, expected a positive number"),
        ({"factor": 0.5}, "factor is 0.5, expected at least 1"),
        ({"beta_slow": 32}, r"beta_slow is 32, expected less than beta_fast \(32\)"),
        ({"attention_factor": 0.3}, "attention_factor is 0.3, expected a number that Megatron reaches"),
        ({"attention_factor": "1"}, "attention_factor is '1', expected a positive number"),
        ({"factor": 1.0, "attention_factor": 1.2}, "attention_factor is 1.2, expected a number"),
        ({"truncate": "no"}, "truncate is 'no', expected true or false"),
        ({"attn_factor": 1.2}, "attn_factor is 1.2, expected no such field"),
        ({"mscale": "1", "mscale_all_dim": 1}, "mscale is '1', expected a number"),
    ):
        scaling = from_hf_config(DENSE | {"rope_scaling": YARN | fields}).rope_scaling
        assert scaling is not None and scaling["rope_type"] == "yarn"
        assert all(scaling[name] == value for name, value in fields.items())
        with pytest.raises(ConfigurationError, match=f"^rope_scaling: {message}"):
            rope.megatron_options(scaling)


def test_rope_parameters_of_transformers_5():
    new = {name: value for name, value in DENSE.items() if not name.startswith("rope_")}
    plain = from_hf_config(new | {"rope_parameters": {"rope_theta": 5e4, "rope_type": "default"}})
    assert (plain.rope_theta, plain.rope_scaling) == (5e4, None)
    linear = {"rope_theta": 5e4, "rope_type": "linear", "factor": 4.0}
    assert from_hf_config(new | {"rope_parameters": linear}).rope_scaling == {
        "rope_type": "linear",
        "factor": 4.0,
    }


def test_theta_is_that_of_the_file_wherever_it_is():
    """transformers 5 takes a theta beside `rope_parameters` where these have none; two different ones are an error."""
    new = {name: value for name, value in DENSE.items() if not name.startswith("rope_")}
    beside = {"rope_theta": 5e5, "rope_parameters": {"rope_type": "default"}}
    assert from_hf_config(new | beside).rope_theta == 5e5
    linear = {
        "rope_theta": 5e5,
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": None},
    }
    assert from_hf_config(new | linear).rope_theta == 5e5
    inside = {"rope_type": "default", "rope_theta": 5e4}
    assert from_hf_config(new | {"rope_theta": 5e4, "rope_parameters": inside}).rope_theta == 5e4
    for wrong, message in (
        (
            {"rope_theta": 5e5, "rope_parameters": inside},
            r"rope_theta is 500000\.0, expected null or that of rope_par",
        ),
        ({"rope_parameters": {"full_attention": inside}}, "rope_parameters is .*one object for all layers"),
        (
            {"rope_parameters": inside, "rope_scaling": {"type": "linear", "factor": 4.0}},
            "rope_scaling is .*the same",
        ),
        (
            {"rope_scaling": {"type": "linear", "rope_type": "dynamic", "factor": 4.0}},
            "type is 'linear', expected",
        ),
    ):
        with pytest.raises(ConfigurationError, match=message):
            from_hf_config(new | wrong)


def test_window_as_long_as_the_context_is_none():
    assert from_hf_config(MISTRAL | {"num_key_value_heads": 2, "sliding_window": 256}).family == "mistral"


QWEN = {"architectures": ["Qwen2ForCausalLM"], "num_key_value_heads": 2, **hf_models.SIZES}


def test_the_window_of_a_qwen_counts_where_a_layer_uses_it():
    """Its switch and the number of layers without a window decide, or `layer_types`; transformers computes the same."""
    short = {"sliding_window": 128}
    full: list[dict[str, Any]] = [
        short,
        short | {"use_sliding_window": False},
        short | {"use_sliding_window": True, "max_window_layers": 2},
        short | {"use_sliding_window": True, "layer_types": ["full_attention"] * 2},
        {"sliding_window": 256, "use_sliding_window": True, "max_window_layers": 0},
    ]
    for config in full:
        assert from_hf_config(QWEN | config).family == "qwen2"
    for layers in (0, 1):
        config = short | {"use_sliding_window": True, "max_window_layers": layers}
        assert "sliding_attention" in Qwen2Config(**(QWEN | config)).layer_types
        with pytest.raises(ConfigurationError, match=r"sliding_window is 128, expected null, or at least"):
            from_hf_config(QWEN | config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "architectures is .*expected one of SkyworkForCausalLM"),
        ({"architectures": "SkyworkForCausalLM"}, "architectures is 'Skywork"),
        ({"architectures": [["SkyworkForCausalLM"]]}, "architectures is"),
        ({"architectures": None, "model_type": ["skywork"]}, "architectures is None"),
        ({"architectures": ["LlamaForCausalLM"], "num_experts": [4]}, "SkyworkForCausalLM, Mixtral"),
        (
            {"architectures": ["Qwen3MoeForCausalLM"], "norm_topk_prob": False},
            "norm_topk_prob is False, .*weighted by",
        ),
        (
            {"architectures": ["Qwen3MoeForCausalLM"]},
            "norm_topk_prob is None, expected true: .*among the chosen",
        ),
        (
            {"architectures": ["MixtralForCausalLM"], "num_local_experts": 0},
            "num_local_experts is 0, expected a posit",
        ),
        ({"architectures": ["MixtralForCausalLM"], "mlp_only_layers": [0]}, "mlp_only_layers is"),
        ({"hidden_size": None}, "hidden_size is None, expected a positive integer"),
        ({"hidden_size": "64"}, "hidden_size is '64'"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"num_hidden_layers": 2.0}, r"num_hidden_layers is 2\.0"),
        ({"num_hidden_layers": 10**7}, "fewer than a million MLPs"),
        ({"vocab_size": 2**40}, "vocab_size is 1099511627776"),
        ({"num_attention_heads": 3, "num_key_value_heads": 3}, "head_dim is None"),
        ({"num_key_value_heads": 3}, "num_query_groups is 3"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', expected 'silu'"),
        ({"attention_bias": True}, "attention_bias is True, expected false"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        (
            {"architectures": ["Qwen3ForCausalLM"], "attention_bias": True},
            "attention_bias is True, .*output proj",
        ),
        ({"add_qkv_bias": 1}, "add_qkv_bias is 1, expected true or false"),
        (
            {"architectures": ["LlamaForCausalLM"], "qk_layernorm": True},
            "qk_layernorm is True, expected False",
        ),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor is 0\.5"),
        ({"rms_norm_eps": -1e-6}, "rms_norm_eps is -1e-06, expected a positive number"),
        ({"rope_theta": float("inf")}, "rope_theta is inf"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear', expected null or an object"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling: factor is None"),
        ({"rope_scaling": {"type": "ntk", "factor": "8"}}, "rope_scaling: factor is '8'"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no', expected true or false"),
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>', expected an integer or null"),
        ({"torch_dtype": "int8"}, "torch_dtype is 'int8', expected one of bfloat16"),
        ({"sliding_window": 128}, r"sliding_window is 128, expected null, or at least .*\(256\)"),
        ({"layer_types": ["sliding_attention", "full_attention"]}, "'full_attention' in every layer"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config is .*expected none"),
        ({"num_experts": [4, 8]}, "the same number in every layer"),
        ({"num_experts": [4], "num_local_experts": 8}, "and as num_local_experts"),
        ({"num_experts": -4}, "num_experts is -4"),
        ({"num_experts": 4, "num_experts_per_tok": 5}, r"moe_router_topk is 5, expected 1 to .*\(4\)"),
        ({"num_experts": 4, "moe_expert_interval": 2}, "moe_expert_interval is 2, expected 1"),
        ({"num_experts": 4, "moe_2layer_gate": True}, "moe_2layer_gate is True, expected false"),
        (
            {"num_experts": 4, "moe_feature_no_mul_topk": False},
            "moe_feature_no_mul_topk is False, expected true",
        ),
        ({"num_experts": 4, "moe_gate_norm_std": 0}, "moe_gate_norm_std is 0, expected a positive number"),
        ({"num_experts": 4, "moe_use_logits_norm": 1}, "moe_use_logits_norm is 1, expected true or false"),
    ],
    ids=str,
)
def test_refused_by_name(changes: dict[str, Any], message: str):
    with pytest.raises(ConfigurationError, match=f"^config.json: .*{message}"):
        from_hf_config(DENSE | changes)


def test_mistral_without_a_window_has_transformers_window():
    with pytest.raises(ConfigurationError, match="sliding_window is None, expected null, or at least"):
        from_hf_config(MISTRAL | {"num_key_value_heads": 2, "max_position_embeddings": 8192})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file"),
        (b"", "is not JSON"),
        (b"\x80\x04pickle", "is not JSON"),
        (b'["SkyworkForCausalLM"]', "holds a list, expected an object"),
        (b'{"rope_theta": NaN}', "is not JSON: NaN is not a JSON value"),
        (b'{"a":' * 100_000, "is not JSON"),
        (b'{"vocab_size": ' + b"9" * 10_000 + b"}", "is not JSON"),
    ],
    ids=["absent", "empty", "pickle", "list", "nan", "nested", "long number"],
)
def test_files_that_are_no_configuration(content: bytes | None, message: str, tmp_path: Path):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigurationError, match=rf"^'{tmp_path}/config.json' {message}"):
        read(tmp_path)


def test_same_values_as_transformers_reads(tmp_path: Path):
    hf_models.llama(tmp_path, num_key_value_heads=2, rope_theta=12345.0, rms_norm_eps=3e-5)
    ours, theirs = read(tmp_path), AutoConfig.from_pretrained(tmp_path)
    assert (ours.rope_theta, ours.rms_norm_eps) == (12345.0, 3e-5)
    assert (hf_models.rope_theta(theirs), theirs.rms_norm_eps) == (12345.0, 3e-5)
    assert ours.dtype == "float32"
    assert dict(ours.raw) == json.loads((tmp_path / "config.json").read_text())


def test_a_dry_run_has_no_time_for_torch():
    modules = ("configuration", "exported_files", "opening", "fp8")
    code = "import sys\n" + "\n".join(
        f"import nemo_skymoe.checkpoint.hugging_face.{name}" for name in modules
    )
    code += "\nassert not {'torch', 'numpy', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
