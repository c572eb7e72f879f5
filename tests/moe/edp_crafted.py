"""Pieces of the dispatcher tests: a configuration, a dispatcher without a layer, experts that only scale."""

from types import SimpleNamespace
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor, distributed

from nemo_skymoe.dispatchers import DISPATCHERS
from nemo_skymoe.moe import edp
from nemo_skymoe.moe.kept_reads import KeptReads
from nemo_skymoe.moe.layer import SkyworkTransformerConfig
from nemo_skymoe.moe.overlap import OverlappedTokenDispatcher
from nemo_skymoe.patches import cpu_runtime

EXPERTS, TOPK, HIDDEN, TOKENS = 8, 3, 12, 16
PADDED = {"moe_expert_capacity_factor": 1.0, "moe_pad_expert_input_to_capacity": True}


def config_for(
    name: str, n: int, dtype: torch.dtype = torch.float64, **options: Any
) -> SkyworkTransformerConfig:
    """Options that the dispatchers read."""
    values: dict[str, Any] = {
        "num_layers": 1,
        "hidden_size": HIDDEN,
        "num_attention_heads": 4,
        "num_moe_experts": EXPERTS,
        "moe_router_topk": TOPK,
        "tensor_model_parallel_size": n,
        "expert_model_parallel_size": n,
        "expert_tensor_parallel_size": 1,
        "sequence_parallel": n > 1 and name != "replicated",
        "add_bias_linear": False,
        "params_dtype": dtype,
        "moe_router_load_balancing_type": "aux_loss",
        "moe_edp": True,
        "edp_dispatcher": name,
    }
    return SkyworkTransformerConfig(**{**values, **options})


def dispatcher_for(config: SkyworkTransformerConfig) -> Any:
    """The dispatcher of a layer 7 that is not there."""
    group: Any = parallel_state.get_tensor_model_parallel_group()
    groups = SimpleNamespace(
        ep=group,
        expt_tp=parallel_state.get_expert_tensor_parallel_group(),
        tp_ep=group,
    )
    chosen = DISPATCHERS[edp.resolve_dispatcher(config)].load().of(config)
    own = chosen(config, groups, SimpleNamespace(layer_number=7, training=True, kept_reads=KeptReads()))
    if not config.edp_overlap:
        return own
    return OverlappedTokenDispatcher(own, groups, lambda *given: (scaled_by_experts(own, *given), None))


def dispatch_and_combine(dispatcher: Any, hidden: Tensor, weights: Tensor) -> Tensor:
    """Megatron's stages around experts that scale by 1 + their number."""
    moved = dispatcher.dispatch_preprocess(hidden.unsqueeze(1), weights != 0, weights)
    given = dispatcher.dispatch_postprocess(*dispatcher.token_dispatch(*moved))
    outputs = scaled_by_experts(getattr(dispatcher, "dispatcher", dispatcher), *given)
    combined = dispatcher.token_combine(dispatcher.combine_preprocess(outputs))
    return dispatcher.combine_postprocess(combined).squeeze(1)


def scaled_by_experts(dispatcher: Any, tokens: Tensor, tokens_per_expert: Tensor, probs: Tensor) -> Tensor:
    """What the local experts make of their rows."""
    assert tokens_per_expert.device.type == "cpu" and tokens_per_expert.dtype == torch.int64
    assert int(tokens_per_expert.sum()) == tokens.shape[0] == probs.shape[0]
    scales = torch.arange(1.0, EXPERTS + 1, dtype=torch.float64)[dispatcher.local_experts]
    return tokens * (probs * scales.repeat_interleave(tokens_per_expert)).unsqueeze(-1).to(tokens.dtype)


def start(n: int) -> None:
    """Process groups with TP = EP = n, ETP = 1."""
    cpu_runtime.apply()
    distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel(n, expert_model_parallel_size=n, expert_tensor_parallel_size=1)


def top_weights(scores_TE: Tensor) -> Tensor:
    """Softmax over the largest scores, 0 elsewhere."""
    values, experts = scores_TE.topk(TOPK, dim=1)
    return torch.zeros_like(scores_TE).scatter(1, experts, values.softmax(dim=1))
