"""A model's description: everything that it is apart from its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nemo_skymoe.architecture import Architecture


@dataclass(frozen=True)
class Description:
    """Everything that the weights do not say. Option names are Megatron's, token ids and `dtype` Hugging Face's."""

    architecture: Architecture
    family: str = "skywork"
    """The name of a dense model's family in Hugging Face's form; an MoE is always a Skywork-MoE."""
    rope_theta: float = 10000.0
    rope_scaling: Mapping[str, Any] | None = None
    """Hugging Face's, None for none. Skywork's "ntk", which only multiplies theta, is in `rope_theta` already."""
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 4096
    dtype: str = "bfloat16"
    """The data type of the weights, by torch's name."""
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    moe_router_logit_norm_scale: float | None = 1.0
    moe_router_logit_norm_correction: int = 1
    raw: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """The config.json that this was read from."""
