"""Upcycling: a dense checkpoint's tensors into those of an MoE that computes the same function at step 0."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Size, Tensor

from nemo_skymoe.checkpoint.torch_dist import empty_extra_states
from nemo_skymoe.config import ConfigurationError

_LAYERS = "module.decoder.layers."
EXPERTS = {
    f"{_LAYERS}mlp.linear_fc1.weight": f"{_LAYERS}mlp.experts.experts.linear_fc1.weight",
    f"{_LAYERS}mlp.linear_fc2.weight": f"{_LAYERS}mlp.experts.experts.linear_fc2.weight",
}
"""Dense MLP matrices [layers, out, in] and the expert matrices [layers, experts, out, in] they become."""
KEPT = (
    "module.embedding.word_embeddings.weight",
    f"{_LAYERS}self_attention.linear_qkv.layer_norm_weight",
    f"{_LAYERS}self_attention.linear_qkv.weight",
    f"{_LAYERS}self_attention.linear_proj.weight",
    f"{_LAYERS}mlp.linear_fc1.layer_norm_weight",
    "module.decoder.final_layernorm.weight",
    "module.output_layer.weight",
)
_LINEAR = tuple(f"{_LAYERS}self_attention.{name}.weight" for name in ("linear_qkv", "linear_proj"))
ROUTER = f"{_LAYERS}mlp.router.weight"


def check_dense(shapes: Mapping[str, Size]) -> None:
    """Refuse anything but a dense checkpoint of Skywork-13B's architecture, naming the first tensor that is off."""
    expected = {*KEPT, *EXPERTS}
    if ROUTER in shapes:
        raise ConfigurationError(
            f"the checkpoint has '{ROUTER}': it is an MoE already, expected a dense model"
        )
    for kind, names in (("lacks", expected - set(shapes)), ("has", set(shapes) - expected)):
        if names:
            raise ConfigurationError(
                f"the checkpoint {kind} '{min(names)}': expected a dense Skywork (RMSNorm, SwiGLU, RoPE, untied"
                " head, no biases)"
            )


def moe_extra_states(layers: int, num_experts: int) -> dict[str, Any]:
    """What else Megatron looks for in an MoE's checkpoint: the empty extra states of its linear layers."""
    states = {}
    for name in _LINEAR:
        states |= empty_extra_states(name, layers)
    for name in EXPERTS.values():
        states |= empty_extra_states(name, layers, num_experts)
    return states


def upcycle(
    dense: Mapping[str, Tensor], num_experts: int, router_std: float = 0.02, seed: int = 0
) -> dict[str, Tensor]:
    """Copy every MLP into `num_experts` experts and draw a router (sec. 3).

    The weights of a token's experts add up to one (eq. 2), so copies compute exactly what the dense MLP did,
    whatever the router says, as long as no token is dropped.

    Args:
        dense: Tensors of a dense checkpoint, layers stacked: [layers, ...].
        num_experts: Experts a layer.
        router_std: Standard deviation of the router's normal initialisation. Never zero: equal logits
            would leave the gate without a direction to grow in.
        seed: Of the router.
    """
    check_dense({name: tensor.shape for name, tensor in dense.items()})
    if num_experts < 2:
        raise ConfigurationError(f"num_experts is {num_experts}, expected at least 2")
    moe = {name: dense[name] for name in KEPT}
    for source, target in EXPERTS.items():
        moe[target] = dense[source].unsqueeze(1).repeat(1, num_experts, 1, 1)
    layers, _, hidden = dense[f"{_LAYERS}mlp.linear_fc1.weight"].shape
    generator = torch.Generator().manual_seed(seed)
    router = torch.empty(layers, num_experts, hidden).normal_(0.0, router_std, generator=generator)
    moe[ROUTER] = router.to(dense[KEPT[0]].dtype)
    return moe
