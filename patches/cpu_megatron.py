"""What Megatron-Core itself takes for granted and a CPU does not have."""

import torch
from megatron.core.tensor_parallel import random
from megatron.core.transformer.moe import moe_utils

from nemo_skymoe.patches import cpu_cuda


def rng_tracker() -> None:
    """tensor_parallel/random.py sets generator states behind `_lazy_call`, which waits for CUDA for ever."""
    setattr(random, "_get_cuda_rng_state", cpu_cuda._get_rng_state)  # noqa: B010
    setattr(random, "_set_cuda_rng_state", cpu_cuda._set_rng_state)  # noqa: B010


def router_gemm() -> None:
    """moe_utils.py reads `te_general_gemm` whether or not Transformer Engine was there to import it from (to 0.16)."""
    if not hasattr(moe_utils, "te_general_gemm"):
        setattr(moe_utils, "te_general_gemm", None)  # noqa: B010


def compilation() -> None:
    """jit.py compiles its fused functions with Inductor, which on a CPU needs a C++ compiler at run time."""
    torch._dynamo.config.disable = True  # pyright: ignore


SUBSTITUTIONS = (rng_tracker, router_gemm, compilation)
