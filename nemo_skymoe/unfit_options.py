"""Options of Megatron that do not go with this project's router, its telemetry, or Expert Data Parallelism.

Most of them are newer than the oldest Megatron-Core that is supported. One that the installed Megatron-Core does not have
counts as off. Those that are not named here leave the router and the dispatchers as they are.
"""

import re
from collections.abc import Iterable
from typing import Any

Unfit = tuple[str, Any, str]
"""An option, its value when it is off, and the reason why it has to be off."""

_OTHER_EXPERTS = (
    "a checkpoint would hold a layer's experts under one name, which no conversion and no learning rate knows"
)
_OTHER_TOKENS = "its ranks hold tokens of their own, over which the routers' sums are not added up"
_ROUTER: tuple[Unfit, ...] = (
    (
        "moe_router_force_biased",
        None,
        "it adds random numbers to normalised logits, for benchmarks; moe_router_force_load_balancing=True is for them",
    ),
    (
        "mlp_chunks_for_training",
        1,
        "a router would see a part of the micro-batch at a time, and take losses and capacities over that",
    ),
    ("moe_single_grouped_weight", False, _OTHER_EXPERTS),
    ("moe_single_grouped_bias", False, _OTHER_EXPERTS),
    (
        "is_hybrid_model",
        False,
        "HybridModel counts an MoE as a layer of its own, and coefficients are kept by the layers of GPTModel",
    ),
    ("gtp_weight_remat_size", 1, _OTHER_TOKENS),
    ("expert_gtp_weight_remat_size", 1, _OTHER_TOKENS),
)
_TELEMETRY: tuple[Unfit, ...] = (
    (
        "moe_enable_routing_replay",
        False,
        "the routing that it replays is not the one whose load and drop rate are measured",
    ),
    (
        "moe_expert_rank_capacity_factor",
        None,
        "the dispatcher drops tokens by it, and no drop rate counts them",
    ),
)
_EDP = "it works inside Megatron's own dispatchers, which those of moe_edp replace"
_DISPATCHERS: tuple[Unfit, ...] = (
    ("moe_shared_expert_overlap", False, _EDP),
    ("moe_router_padding_for_fp8", False, _EDP),
    ("moe_router_padding_for_quantization", False, _EDP),
    ("overlap_moe_expert_parallel_comm", False, _EDP),
    ("overlap_dispatch_backward_with_experts_wgrad", False, _EDP),
    ("moe_expert_rank_capacity_factor", None, _EDP),
    ("moe_paged_stash", False, _EDP),
    ("moe_latent_size", None, "its projections were not tried with the dispatchers of moe_edp"),
)


def unfit_for_router(config: Any) -> str | None:
    """Return a sentence on an option that does not go with the router or its telemetry, or None."""
    if getattr(config, "transformer_impl", None) == "inference_optimized":
        return (
            "transformer_impl is 'inference_optimized', which has a router of its own; expected 'local' or"
            " 'transformer_engine'"
        )
    if reason := _first(config, _ROUTER):
        return reason
    # A rank of NCCL-EP that exceeds its capacity ends the training: it drops nothing.
    dropless = getattr(config, "moe_flex_dispatcher_backend", None) == "ncclep"
    measured = [row for row in _TELEMETRY if not (dropless and row[0] == "moe_expert_rank_capacity_factor")]
    if config.moe_router_telemetry and (reason := _first(config, measured)):
        return f"{reason}; or moe_router_telemetry=False"
    return None


def unfit_for_edp(config: Any) -> str | None:
    """Return a sentence on an option that does not go with the dispatchers of `moe_edp`, or None."""
    reason = _first(config, _DISPATCHERS)
    return reason and f"{reason}; or moe_edp=False"


def in_our_words(config: Any, reason: str) -> str:
    """Return the reason for which Megatron refuses a configuration, with the option's name where Megatron has none."""
    # megatron-core up to 0.16 only fails to import the kernels.
    if getattr(config, "moe_permute_fusion", False) and re.search("fused[_ ]permut", reason):
        return (
            "moe_permute_fusion is True, expected False: its kernels come with Transformer Engine 2.1 or later, which"
            f" is not installed ({reason})"
        )
    return reason


def _first(config: Any, options: Iterable[Unfit]) -> str | None:
    for option, off, reason in options:
        value = getattr(config, option, off)
        if value is not None and value != off:
            return f"{option} is {value!r}, expected {off}: {reason}"
    return None
