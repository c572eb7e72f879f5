"""RMSNorm for the local layer spec, usable with sequence parallelism."""

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm over the last dimension of [S, B, H], as Megatron's layer specs call a norm.

    Megatron's own wrapper refuses sequence parallelism. All it takes is the tag by which Megatron sums the
    gradient of a parameter that every tensor-parallel rank applies to other tokens.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010
