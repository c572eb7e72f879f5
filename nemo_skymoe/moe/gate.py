"""The parameters and matrix products of the gate, which is linear, linear with a bias, or has two layers and a tanh.

Shape suffixes: S sequence, B micro-batch, H hidden, F = 8 * E gate width, E experts.
"""

import inspect
from typing import Any, cast

import torch
from megatron.core.transformer.moe import moe_utils
from torch import Tensor
from torch.nn import Parameter

from nemo_skymoe.config import SkyworkOptions

# The authors' published two-layer gate (MoE++) has 8 hidden units per expert.
_WIDTH_PER_EXPERT = 8
_LINEAR_TAKES_BIAS = "bias" in inspect.signature(moe_utils.router_gating_linear).parameters


def add_gate_parameters(router: Any) -> None:
    """Give one of Megatron's routers the gate that its configuration asks for.

    The linear gate keeps Megatron's `weight` [E, H]. The two-layer gate z = W2 tanh(W1 x) keeps W1 [8 E, H] in
    `hidden_weight` and W2 [E, 8 E] in `weight`. `bias` [E] starts at zero.
    """
    options = cast(SkyworkOptions, router.config)
    experts, hidden = router.weight.shape
    if options.moe_router_two_layer_gate:
        width = _WIDTH_PER_EXPERT * experts
        router.hidden_weight = _parameter(router, torch.empty(width, hidden), initialize=True)
        router.weight = _parameter(router, torch.empty(experts, width), initialize=True)
    has_bias = options.moe_router_gate_bias or router.config.add_bias_linear
    router.bias = _parameter(router, torch.zeros(experts)) if has_bias else None


def _parameter(router: Any, value: Tensor, initialize: bool = False) -> Parameter:
    config = router.config
    value = value.to(router.weight.device)
    if initialize and config.perform_initialization:
        config.init_method(value)
    return Parameter(value.to(config.params_dtype))


def sum_gradients_over_tokens(router: Any) -> None:
    """Mark every parameter of a router, those of a user's subclass too, for Megatron's sum of gradients over the ranks.

    With sequence parallelism every tensor-parallel rank sees other tokens. Megatron sums the gradients of parameters
    with the attribute `sequence_parallel` over the ranks. A parameter that has the attribute, or that is itself split
    over the ranks, is left as it is.
    """
    for parameter in router.parameters():
        if not hasattr(parameter, "sequence_parallel") and not getattr(
            parameter, "tensor_model_parallel", False
        ):
            parameter.sequence_parallel = router.config.sequence_parallel


def gate_logits(router: Any, input_SBH: Tensor) -> Tensor:
    """Return the raw gating logits [S, B, E] in float32; float64 for a float64 model or `moe_router_dtype="fp64"`.

    Like Megatron's, a gate that is still on the CPU follows its input to the device: Megatron makes routers on the CPU.
    """
    _follow(router, input_SBH.device)
    double = input_SBH.dtype == torch.float64 or router.config.moe_router_dtype == "fp64"
    dtype = torch.float64 if double else torch.float32
    if cast(SkyworkOptions, router.config).moe_router_two_layer_gate:
        input_SBH = torch.tanh(_linear(input_SBH, router.hidden_weight, None, dtype))
    return _linear(input_SBH, router.weight, router.bias, dtype)


def _follow(router: Any, device: torch.device) -> None:
    for parameter in router.parameters():
        if parameter.device.type == "cpu" and device.type != "cpu":
            parameter.data = parameter.data.to(device)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    linear: Any = moe_utils.router_gating_linear
    # Transformer Engine, which Megatron takes if it is there, multiplies two matrices of one type. Megatron's function
    # fails for no tokens.
    if input.dtype != weight.dtype or input.numel() == 0:
        input, weight = input.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    if input.numel() == 0:
        return torch.nn.functional.linear(input, weight, bias)
    if _LINEAR_TAKES_BIAS:
        return linear(input, weight, bias, dtype)
    # The function of Megatron 0.14 takes no bias.
    logits = linear(input, weight, dtype)
    return logits if bias is None else logits + bias.to(dtype)
