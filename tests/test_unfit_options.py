"""Options of Megatron that would be silently wrong with our router or dispatchers are refused by name, in every version."""

from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import pytest
from megatron.core.transformer import TransformerConfig

from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.unfit_options import unfit_for_edp, unfit_for_router
from tests.cases import every
from tests.test_config import configuration

INSTALLED = {field.name for field in fields(TransformerConfig)}
ROUTER: list[tuple[str, Any]] = [
    ("moe_router_force_biased", 0.1),
    ("mlp_chunks_for_training", 2),
    ("moe_single_grouped_weight", True),
    ("moe_single_grouped_bias", True),
    ("is_hybrid_model", True),
    ("gtp_weight_remat_size", 2),
    ("expert_gtp_weight_remat_size", 2),
    ("transformer_impl", "inference_optimized"),
]
TELEMETRY = [("moe_enable_routing_replay", True), ("moe_expert_rank_capacity_factor", 1.5)]
EDP = [
    ("moe_shared_expert_overlap", True),
    ("moe_router_padding_for_fp8", True),
    ("moe_router_padding_for_quantization", True),
    ("overlap_moe_expert_parallel_comm", True),
    ("overlap_dispatch_backward_with_experts_wgrad", True),
    ("moe_expert_rank_capacity_factor", 1.5),
    ("moe_paged_stash", True),
    ("moe_latent_size", 8),
]


def options(**given: Any) -> SimpleNamespace:
    return SimpleNamespace(moe_router_telemetry=True, **given)


@every(("option", "value"), ROUTER + TELEMETRY)
def test_an_option_that_changes_what_the_router_does_is_refused(option: str, value: Any) -> None:
    assert f"{option} is {value!r}" in str(unfit_for_router(options(**{option: value})))
    if option in INSTALLED:
        with pytest.raises(ConfigurationError, match=f"^{option} is {value!r}.* expected"):
            configuration(**{option: value})


@every(("option", "value"), TELEMETRY)
def test_what_only_the_telemetry_would_not_see_is_allowed_without_it(option: str, value: Any) -> None:
    silent = options(**{option: value})
    silent.moe_router_telemetry = False
    assert unfit_for_router(silent) is None


def test_nccls_expert_parallelism_drops_nothing() -> None:
    given = options(moe_expert_rank_capacity_factor=2.0, moe_flex_dispatcher_backend="ncclep")
    assert unfit_for_router(given) is None


@every(("option", "value"), EDP)
def test_an_option_of_megatrons_dispatchers_is_refused_under_edp(option: str, value: Any) -> None:
    assert f"{option} is {value!r}" in str(unfit_for_edp(options(**{option: value})))


def test_options_that_are_off_or_not_installed_are_fine() -> None:
    off = {name: None for name, _ in (*ROUTER, *TELEMETRY, *EDP)}
    for given in (options(), options(**off), options(mlp_chunks_for_training=1, moe_paged_stash=False)):
        assert unfit_for_router(given) is None and unfit_for_edp(given) is None
    assert unfit_for_router(configuration()) is None and unfit_for_edp(configuration()) is None
