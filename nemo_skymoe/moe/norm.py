"""An RMSNorm for the local layer spec that works with sequence parallelism."""

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm over the last dimension of [S, B, H], with the constructor that Megatron's layer specs expect.

    Megatron's own wrapper refuses sequence parallelism. Supporting it takes nothing but the attribute by which Megatron
    recognises parameters that every tensor-parallel rank applies to other tokens, and whose gradients it sums.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010
