"""Options are refused by name, before any work starts."""

import math
from dataclasses import fields
from typing import Any

import pytest
import torch
from megatron.core.transformer import TransformerConfig

from nemo_skymoe.config import ConfigurationError, SkyworkOptions
from nemo_skymoe.moe.layer import SkyworkTransformerConfig
from tests.cases import every


def configuration(**options: Any) -> SkyworkTransformerConfig:
    values: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": 16,
        "num_attention_heads": 4,
        "num_moe_experts": 8,
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": 0.01,
        "add_bias_linear": False,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
    }
    return SkyworkTransformerConfig(**{**values, **options})


SHARED = {"moe_shared_expert_intermediate_size": 8, "moe_token_dispatcher_type": "allgather"}


def test_defaults_are_the_reports() -> None:
    config = configuration()
    assert config.moe_router_logit_norm_scale == 1.0 and config.moe_router_logit_norm_correction == 1
    assert config.moe_adaptive_aux_loss
    assert config.moe_adaptive_aux_loss_sensitivity == 1 / 5
    assert config.moe_adaptive_aux_loss_maximum == 0.01
    assert config.moe_adaptive_aux_loss_smoothing == 0.99
    assert config.moe_adaptive_aux_loss_initial is None
    assert not config.moe_router_two_layer_gate and not config.moe_router_gate_bias


def test_no_option_shadows_megatrons() -> None:
    megatron = {field.name for field in fields(TransformerConfig)}
    assert not megatron & {field.name for field in fields(SkyworkOptions)}


def test_checks_can_run_again() -> None:
    """NeMo runs them twice."""
    config = configuration()
    config.__post_init__()
    config.moe_router_topk = 9
    with pytest.raises(ConfigurationError, match="moe_router_topk"):
        config.__post_init__()


def test_a_dense_model_asks_nothing() -> None:
    configuration(num_moe_experts=None, moe_ffn_hidden_size=None, moe_aux_loss_form="square")


@every(
    ("options", "message"),
    [
        (
            {"moe_router_logit_norm_scale": 0.0},
            "moe_router_logit_norm_scale is 0.0, expected a finite number above 0",
        ),
        ({"moe_router_logit_norm_scale": float("nan")}, "moe_router_logit_norm_scale is nan"),
        (
            {"moe_router_logit_norm_correction": 2},
            "moe_router_logit_norm_correction is 2, expected one of 0, 1",
        ),
        ({"moe_router_logit_norm_eps": -1.0}, "moe_router_logit_norm_eps is -1.0"),
        ({"moe_aux_loss_form": "cosine"}, "moe_aux_loss_form is 'cosine', expected one of switch, square"),
        ({"moe_adaptive_aux_loss_sensitivity": -0.2}, "moe_adaptive_aux_loss_sensitivity is -0.2"),
        ({"moe_adaptive_aux_loss_maximum": float("inf")}, "moe_adaptive_aux_loss_maximum is inf"),
        (
            {"moe_adaptive_aux_loss_smoothing": 1.0},
            "moe_adaptive_aux_loss_smoothing is 1.0, expected 0 <= beta < 1",
        ),
        (
            {"moe_adaptive_aux_loss_initial": 0.02},
            "moe_adaptive_aux_loss_initial is 0.02, expected 0 <= alpha_0",
        ),
        ({"moe_nominal_capacity_factor": 0.0}, "moe_nominal_capacity_factor is 0.0"),
        ({"moe_router_topk": 9}, "moe_router_topk is 9, expected at most num_moe_experts = 8"),
        ({"moe_router_topk": 1}, "moe_router_topk=1 with renormalised weights .* the router no gradient"),
        (
            {"moe_router_score_function": "sigmoid"},
            "moe_router_score_function is 'sigmoid', expected 'softmax'",
        ),
        (
            {"moe_router_num_groups": 4, "moe_router_group_topk": 2},
            "moe_router_group_topk is 2 .* expected None",
        ),
        ({"moe_router_load_balancing_type": "sinkhorn"}, "'sinkhorn' .* does not support an auxiliary loss"),
        (
            {"moe_router_load_balancing_type": "seq_aux_loss"},
            "moe_adaptive_aux_loss needs .*'aux_loss', got 'seq_a",
        ),
        (
            {
                "moe_router_load_balancing_type": "seq_aux_loss",
                "moe_adaptive_aux_loss": False,
                "moe_aux_loss_form": "square",
            },
            "moe_aux_loss_form='square' .* got 'seq_aux_loss'",
        ),
        ({"moe_router_telemetry": False}, "moe_router_telemetry=False does not measure"),
        ({"mtp_num_layers": 1}, "mtp_num_layers is 1, expected None"),
        (
            {"enable_cuda_graph": True, "moe_adaptive_aux_loss": False},
            "moe_router_telemetry is True, .*in a captured CUDA graph",
        ),
        (
            {"enable_cuda_graph": True},
            "moe_adaptive_aux_loss is True, .*in a captured CUDA graph: cuda_graph_(scope|modules) is .*, expected 'attn'",
        ),
        ({"expert_model_parallel_size": 3}, "expected a multiple of expert_model_parallel_size = 3"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        configuration(**options)


@every(
    ("options", "reason"),
    [
        ({"moe_pad_expert_input_to_capacity": True}, "moe_expert_capacity_factor must be set to use"),
        ({"moe_router_enable_expert_bias": True}, "score function"),
        ({"num_moe_experts": 0}, None),
        (
            {"moe_shared_expert_overlap": True, **SHARED},
            "only works with alltoall( or flex)? token dispatcher",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_megatron_refuses_is_refused_with_its_reason(
    options: dict[str, Any], reason: str | None
) -> None:
    with pytest.raises(ConfigurationError, match=reason):
        configuration(**options)


def test_allowed() -> None:
    configuration(moe_router_topk=1, moe_router_pre_softmax=True)
    configuration(moe_router_telemetry=False, moe_adaptive_aux_loss=False)
    configuration(enable_cuda_graph=True, cuda_graph_scope="attn", moe_adaptive_aux_loss=False)
    configuration(
        moe_router_load_balancing_type="none", moe_adaptive_aux_loss=False, moe_expert_capacity_factor=1.0
    )


NUMBERS: dict[str, list[Any]] = {
    "num_moe_experts": [0, -1, 2.5, "8", True, [8]],
    "moe_router_topk": [0, -1, 2.0, "2", True, math.nan, [2], None],
    "moe_aux_loss_coeff": [-0.01, math.nan, math.inf, "0.01", None, [0.01], (0.01,)],
    "moe_z_loss_coeff": [-1e-3, math.nan, math.inf, "1e-3", [1e-3]],
    "moe_input_jitter_eps": [-0.1, math.nan, 1.0, 0, "0.1"],
    "moe_ffn_hidden_size": [0, -4, 24.5, "24"],
    "moe_shared_expert_intermediate_size": [0, -1, 8.5, "8", True],
    "moe_token_drop_policy": ["random", None],
    "moe_token_dispatcher_type": ["alltoall_seq", None],
    "moe_router_dtype": ["bf16", torch.float32],
    "moe_router_load_balancing_type": ["aux", None, 1, [], ("aux_loss",)],
    "num_layers": [0, -2, "2", 2.0],
    **{
        f"{group}_parallel_size": [0, -1, 2.0, "2", True]
        for group in ("tensor_model", "pipeline_model", "context", "expert_model", "expert_tensor")
    },
    "moe_router_topk_scaling_factor": [0.0, -2.0, math.nan],
    "moe_expert_capacity_factor": [0, 0.0, math.nan, math.inf, "1.25"],
    "moe_layer_freq": [0, -1, 1.5, "1", [0, 0], [1], [1, 2], [1, 1, 1], [], (1, 1), None, "[0, 1]"],
}


def test_values_that_are_none_are_refused_by_their_name() -> None:
    for option, values in NUMBERS.items():
        for value in values:
            with pytest.raises(ConfigurationError, match=f"^{option} (is|has) "):
                configuration(**{option: value})
    kinds = {"moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss"], "moe_adaptive_aux_loss": False}
    configuration(**kinds, moe_aux_loss_coeff=[0.1, 0.2])
    for value in ([0.1, math.nan], [-1.0, 0.1], [0.1], 0.1):
        with pytest.raises(ConfigurationError, match=r"^moe_aux_loss_coeff is "):
            configuration(**kinds, moe_aux_loss_coeff=value)
    for value in (["aux_loss", "aux"], ["aux_loss", "aux_loss"]):  # Megatron would leave the second out
        with pytest.raises(ConfigurationError, match=r"^moe_router_load_balancing_type is "):
            configuration(
                moe_router_load_balancing_type=value,
                moe_aux_loss_coeff=[0.1, 0.2],
                moe_adaptive_aux_loss=False,
            )


def test_text_in_place_of_any_truth_value_or_number_is_refused() -> None:
    """Megatron would take `"false"` for true."""
    for option in (
        "moe_router_pre_softmax",
        "moe_grouped_gemm",
        "moe_pad_expert_input_to_capacity",
        "moe_router_force_load_balancing",
        "sequence_parallel",
        "calculate_per_token_loss",
        "add_bias_linear",
    ):
        with pytest.raises(ConfigurationError, match=f"^{option} is 'false', expected True or False"):
            configuration(**{option: "false"})
    for option in ("hidden_size", "layernorm_epsilon", "init_method_std", "hidden_dropout"):
        with pytest.raises(ConfigurationError, match=f"^{option} is '1', expected a (whole )?number"):
            configuration(**{option: "1"})


def test_an_option_of_ours_of_another_type_is_refused_by_its_name() -> None:
    """As a command line may pass them on: `"true"` would be true, and `"false"` too."""
    for field in fields(SkyworkOptions):
        default = field.default
        values: list[Any] = ["x"] if not isinstance(default, str) else [1.0, None]
        values += ["true", "false", 1] if isinstance(default, bool) else [True]
        values += [math.nan, math.inf] if isinstance(default, float) else []
        for value in values:
            with pytest.raises(ConfigurationError, match=f"^{field.name} is "):
                configuration(**{field.name: value})


def test_megatrons_negative_capacity_is_none() -> None:
    assert configuration(moe_expert_capacity_factor=-1).moe_expert_capacity_factor is None


def test_what_megatron_makes_of_the_options_is_checked_too() -> None:
    """It turns limited devices into groups of experts, and fp8 padding into padding for any quantisation."""
    with pytest.raises(ConfigurationError, match="moe_router_topk_limited_devices is 1, expected None"):
        configuration(moe_router_topk_limited_devices=1, expert_model_parallel_size=2)
    config: Any = configuration(moe_edp=True, expert_tensor_parallel_size=1)
    for option in ("moe_router_padding_for_fp8", "moe_router_padding_for_quantization"):
        setattr(config, option, True)  # where Transformer Engine, which is not there, would allow it
        with pytest.raises(ConfigurationError, match=f"{option} is True, expected False: .*moe_edp=False"):
            config._check_parallelism()
        setattr(config, option, False)


def test_a_router_that_cannot_learn_is_refused() -> None:
    off = {"moe_router_logit_norm_scale": None}
    for refused, message in (
        ({"num_moe_experts": 2}, "num_moe_experts=2 with moe_router_logit_norm_scale"),
        ({"num_moe_experts": 2, "moe_router_topk": 1, "moe_router_pre_softmax": True}, "num_moe_experts=2"),
        ({"num_moe_experts": 2, "moe_router_logit_norm_correction": 0}, "num_moe_experts=2"),
        ({"moe_router_topk": 1}, "moe_router_topk=1"),
        ({"moe_router_topk": 1, **off}, "moe_router_topk=1"),
        ({"moe_router_logit_norm_scale": 1e-9}, "moe_router_logit_norm_scale is 1e-09"),
        ({"moe_router_logit_norm_scale": 1e4}, "moe_router_logit_norm_scale is 10000"),
        ({"moe_router_logit_norm_eps": 10.0}, "moe_router_logit_norm_eps is 10"),
        (
            {"num_moe_experts": 1, "moe_router_topk": 1, "moe_router_pre_softmax": True},
            "num_moe_experts is 1",
        ),
        (
            {"moe_router_two_layer_gate": True, "init_method_std": 0.0},
            "init_method_std is 0 with moe_router_two",
        ),
        ({"moe_router_force_load_balancing": True}, "moe_router_force_load_balancing=True replaces"),
        ({"moe_apply_probs_on_input": True}, "moe_apply_probs_on_input=True needs moe_router_topk=1"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            configuration(**refused)
    configuration(num_moe_experts=2, **off)
    configuration(num_moe_experts=3)


def test_random_logits_under_replicated_edp_are_refused() -> None:
    edp = {"moe_edp": True, "tensor_model_parallel_size": 2, "expert_model_parallel_size": 2}
    options = {
        **edp,
        "expert_tensor_parallel_size": 1,
        "moe_router_force_load_balancing": True,
        "moe_adaptive_aux_loss": False,
    }
    configuration(**options, sequence_parallel=True)
    with pytest.raises(
        ConfigurationError, match="moe_router_force_load_balancing=True draws other random logits"
    ):
        configuration(**options)


def test_experts_that_megatron_reduces_over_the_wrong_ranks_are_refused() -> None:
    with pytest.raises(
        ConfigurationError, match="expert_tensor_parallel_size is 1 with tensor_model_parallel_size=2"
    ):
        configuration(tensor_model_parallel_size=2, expert_tensor_parallel_size=1, sequence_parallel=True)
    configuration(tensor_model_parallel_size=2, sequence_parallel=True)


def test_a_layout_that_serves_but_does_not_train_is_told_apart() -> None:
    """Megatron evaluates with tensor parallelism alone; its MoE layer refuses to train so."""
    serving = configuration(tensor_model_parallel_size=2)
    with pytest.raises(
        ConfigurationError, match="sequence_parallel is False with tensor_model_parallel_size=2"
    ):
        serving.check_training()
    edp = {"moe_edp": True, "expert_model_parallel_size": 2, "expert_tensor_parallel_size": 1}
    for options in ({"sequence_parallel": True}, edp, {"num_moe_experts": None, "moe_aux_loss_coeff": 0.0}):
        configuration(tensor_model_parallel_size=2, **options).check_training()
