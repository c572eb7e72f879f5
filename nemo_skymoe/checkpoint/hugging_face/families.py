"""The classes of transformers whose checkpoints are read and written here, and what each of them has and assumes."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_skymoe.checkpoint.description import Description
from nemo_skymoe.durable.errors import ConfigurationError


@dataclass(frozen=True)
class Family:
    """A class, and the values that it takes (for Skywork, the authors' code) where config.json is silent."""

    class_name: str
    context: int
    groups: int | None = None
    """Key-value heads; None means one for every attention head."""
    head: int | None = None
    """Size of a head; None means hidden_size / num_attention_heads."""
    theta: float = 10000.0
    eps: float = 1e-6
    experts: int | None = None
    """Experts of a class that is never dense; None for all others."""
    topk: int = 2
    expert_size: int | None = None
    add_qkv_bias: bool = False
    qk_layernorm: bool = False
    window: int | None = None
    """The attention window that is there unless the file says null."""
    has_window_switch: bool = False
    """Whether `use_sliding_window` turns the window on."""


FAMILIES = {
    "skywork": Family("SkyworkForCausalLM", 4096),
    "llama": Family("LlamaForCausalLM", 2048),
    "mistral": Family("MistralForCausalLM", 131072, groups=8, window=4096),
    "qwen2": Family(
        "Qwen2ForCausalLM", 32768, groups=32, add_qkv_bias=True, window=4096, has_window_switch=True
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM", 32768, groups=32, head=128, qk_layernorm=True, window=4096, has_window_switch=True
    ),
    "mixtral": Family("MixtralForCausalLM", 131072, groups=8, theta=1e6, eps=1e-5, experts=8),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        32768,
        groups=4,
        experts=128,
        topk=8,
        expert_size=768,
        qk_layernorm=True,
        window=4096,
        has_window_switch=True,
    ),
}
"""By `model_type`. Skywork-13B and Skywork-MoE share a class."""
CLASSES = {
    "SkyworkForCausalLM": "skywork",
    "QuantSkyworkForCausalLM": "skywork",
    **{family.class_name: name for name, family in FAMILIES.items()},
}
LAYOUTS = ("skywork", "mixtral", "qwen3_moe")
"""The families in which an MoE can be written."""


def layout_of(description: Description, layout: str | None) -> str:
    """Return the family in whose form a model is written.

    Args:
        description: The model.
        layout: One of LAYOUTS for an MoE; None for the class that it was read from, or Skywork's if that was dense.

    Raises:
        ConfigurationError: The layout cannot express the model.
    """
    architecture = description.architecture
    if architecture.num_moe_experts is None:
        if layout is not None:
            raise ConfigurationError(
                f"layout is {layout!r}, but the model is dense and keeps its class: expected none"
            )
        return description.family
    if layout is None:
        layout = description.family if description.family in LAYOUTS else "skywork"
    if layout != "skywork":
        _check(description, layout)
    return layout


def _check(description: Description, layout: str) -> None:
    architecture = description.architecture
    normed = architecture.qk_layernorm
    for wrong, because in (
        (
            description.moe_router_logit_norm_scale is not None,
            "the gate's logits are normalised (moe_router_logit_norm_scale is"
            f" {description.moe_router_logit_norm_scale}), which it does not do",
        ),
        (architecture.add_qkv_bias, "it has no biases of queries, keys and values alone (add_qkv_bias)"),
        (
            layout == "mixtral" and normed,
            "it has no norms of queries and keys (qk_layernorm); qwen3_moe has",
        ),
        (layout == "qwen3_moe" and not normed, "its norms of queries and keys are not in the model"),
        (
            layout == "mixtral" and architecture.layers_differ,
            "it has experts in every layer, and some layers of the model are dense",
        ),
    ):
        if wrong:
            raise ConfigurationError(
                f"layout is {layout!r}, which cannot express the model: {because}; expected 'skywork'"
            )
