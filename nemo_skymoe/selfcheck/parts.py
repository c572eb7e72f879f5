"""The parts of Transformer Engine, Apex and Triton that are here, and what runs without them."""

import importlib

from nemo_skymoe.selfcheck.finding import Finding

PARTS = {
    "transformer_engine.pytorch:Linear": "Megatron's local layers take the place of Transformer Engine's",
    "transformer_engine.pytorch:GroupedLinear": "experts are computed one after the other",
    "transformer_engine.pytorch:DotProductAttention": "attention is Megatron's own",
    "transformer_engine.pytorch.permutation:moe_permute": "moe_permute_fusion has to be off",
    "transformer_engine.pytorch.permutation:moe_sort_chunks_by_index": "moe_permute_fusion has to be off",
    "transformer_engine.pytorch.router:fused_topk_with_score_function": "moe_router_fusion has to be off",
    "apex.optimizers:FusedAdam": "Adam is Transformer Engine's or PyTorch's",
    "apex.normalization.fused_layer_norm:FusedRMSNorm": "norms are Transformer Engine's or PyTorch's",
    "scaled_masked_softmax_cuda:forward": "masked_softmax_fusion has to be off without Transformer Engine",
    "amp_C:multi_tensor_l2norm": "gradient norms are computed tensor by tensor",
    "triton:jit": "kernels of this package in Triton have to be off",
}
"""Each part as "module:name", and what its absence means."""


def check() -> list[Finding]:
    """Import every part; one that is installed and cannot be imported is wrong."""
    return [_found(part, absence) for part, absence in PARTS.items()]


def _found(part: str, absence: str) -> Finding:
    module, _, name = part.partition(":")
    what = f"{module}.{name}"
    try:
        there = hasattr(importlib.import_module(module), name)
    except ModuleNotFoundError:
        there = False
    except Exception as reason:  # a compiled module of another version fails in any way
        return Finding("WRONG", what, f"it is installed and cannot be imported: {reason}")
    return Finding("ok", what) if there else Finding("absent", what, absence)
