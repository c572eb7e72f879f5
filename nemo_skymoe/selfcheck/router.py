"""The router beside Megatron's: the kernels that a pass starts, and its time."""

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.router import TopKRouter

from nemo_skymoe import gpus
from nemo_skymoe.moe.layer import SkyworkTransformerConfig
from nemo_skymoe.moe.router import SkyworkRouter
from nemo_skymoe.selfcheck.finding import Finding
from nemo_skymoe.selfcheck.host_waits import host_waits
from nemo_skymoe.selfcheck.launches import launches
from nemo_skymoe.selfcheck.world import drawn, microseconds, world

TOKENS, HIDDEN = 4096, 4608


@dataclass(frozen=True)
class Variant:
    """A router class with its options."""

    name: str
    router: type[TopKRouter]
    options: dict[str, Any]


OFF = {"moe_router_logit_norm_scale": None, "moe_router_telemetry": False, "moe_adaptive_aux_loss": False}
VARIANTS = (
    Variant("Megatron's router", TopKRouter, OFF),
    Variant("with normalisation", SkyworkRouter, {**OFF, "moe_router_logit_norm_scale": 1.0}),
    Variant("with normalisation, telemetry and coefficients", SkyworkRouter, {}),
)


def check() -> list[Finding]:
    """Count and time every variant, with 16 experts, top-2, at a capacity factor of 1.25."""
    tokens, hidden = (TOKENS, HIDDEN) if gpus.in_use() else (64, 64)
    with world():
        return [_measured(variant, tokens, hidden) for variant in VARIANTS]


def _measured(variant: Variant, tokens: int, hidden: int) -> Finding:
    router = build(variant, experts=16, topk=2, capacity_factor=1.25, hidden=hidden)
    x = drawn("x", (tokens, 1, hidden), router.weight.dtype).requires_grad_()
    upstream = torch.ones(tokens, 16, device=x.device)

    def run() -> None:
        router(x)[0].backward(upstream)

    run()  # what is computed once is kept
    forward, (probs, _) = launches(lambda: router(x))
    backward, _ = launches(lambda: probs.backward(upstream))
    return Finding(
        "measured",
        variant.name,
        f"{forward} kernels forward, {backward} backward, {microseconds(run):.0f} us there and back for {tokens}"
        f" tokens of {hidden} in {router.weight.dtype}, {host_waits(run)} host waits",
    )


def build(
    variant: Variant,
    *,
    experts: int,
    topk: int,
    capacity_factor: float | None,
    hidden: int = HIDDEN,
    dtype: torch.dtype | None = None,
) -> Any:
    """Return a router on this process's device, every one with the same weights."""
    config = SkyworkTransformerConfig(
        num_layers=1,
        hidden_size=hidden,
        num_attention_heads=4,
        num_moe_experts=experts,
        moe_router_topk=topk,
        moe_router_dtype="fp32",
        moe_router_load_balancing_type="aux_loss",
        moe_aux_loss_coeff=1e-2,
        moe_expert_capacity_factor=capacity_factor,
        add_bias_linear=False,
        params_dtype=dtype or (torch.bfloat16 if gpus.in_use() else torch.float32),
        **variant.options,
    )
    make: Any = variant.router
    if hasattr(moe_utils, "get_default_pg_collection"):
        router = make(config, pg_collection=moe_utils.get_default_pg_collection())
    else:  # Megatron 0.14
        old: Any = moe_utils
        router = make(config, model_comm_pgs=old.get_default_model_comm_pgs())
    router.set_layer_number(1)
    router.weight.data.copy_(drawn("router", (experts, hidden)) * 0.02)
    return router.to(gpus.device())
