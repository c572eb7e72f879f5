"""Megatron's router without Transformer Engine.

Upstream: megatron/core/transformer/moe/moe_utils.py, 0.14 to 0.16 (fixed in 0.17): `te_general_gemm` is
only defined where Transformer Engine imports, and the router's matrix product reads it regardless, so
that every router without it ends in a NameError.
"""


def apply() -> bool:
    """Define the missing name as absent, and say whether that was needed."""
    from megatron.core.transformer.moe import moe_utils

    if hasattr(moe_utils, "te_general_gemm") or not hasattr(moe_utils, "RouterGatingLinearFunction"):
        return False
    moe_utils.te_general_gemm = None
    return True
