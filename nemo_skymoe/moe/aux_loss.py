"""Auxiliary load-balancing loss: the report's eq. (4), and coefficients that adapt to the drop rate (eq. 7-9)."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
from torch import Tensor

from nemo_skymoe.config import ConfigurationError


def squared_load_balancing_loss(
    scores: Tensor, total_tokens: int | Tensor, coefficient: float, group: torch.distributed.ProcessGroup
) -> Tensor:
    """Eq. (4): coefficient * sum_j (1/n - P_j)^2, P_j the mean gate of expert j over the tokens of `group`.

    As with Megatron's Switch form, the value is this rank's share (the shares of the group's ranks add up
    to the loss) and the gradient is that of the whole loss with respect to this rank's scores.

    Args:
        scores: [tokens, n] gate values (softmax over all experts).
        total_tokens: Tokens of all ranks of the group.
        coefficient: alpha.
        group: The ranks that share a micro-batch (TP x CP).
    """
    # Summed in float64: the loss is a small difference, and must not depend on how tokens are spread over ranks.
    share = scores.sum(dim=0, dtype=torch.float64) / total_tokens
    mean_gate = reduce_from_tensor_model_parallel_region(share, group)
    loss = coefficient * (mean_gate - 1.0 / scores.shape[-1]).square().sum()
    return scale_value(loss, 1.0 / group.size())


def scale_value(loss: Tensor, factor: float) -> Tensor:
    """`loss` with its value multiplied by `factor` and its gradient untouched."""
    return loss if factor == 1.0 else loss + (factor - 1.0) * loss.detach()


class AdaptiveAuxLossCoefficients:
    """One auxiliary-loss coefficient per MoE layer, following that layer's token drop rate (eq. 7-9).

    Per optimizer step: estimate = min(sensitivity * drop_rate, maximum);
    coefficient = smoothing * coefficient + (1 - smoothing) * estimate. Python floats throughout, so neither
    bf16 training nor a device changes them. The constants are those of the report's section 4.2.

    Args:
        num_layers: Number of MoE layers, counted over the whole model.
        sensitivity: xi.
        maximum: alpha_max.
        smoothing: beta.
        initial: alpha_0, which the report does not give; None starts at `maximum`, as its Figure 4 does.
    """

    def __init__(
        self,
        num_layers: int,
        sensitivity: float = 0.2,
        maximum: float = 0.01,
        smoothing: float = 0.99,
        initial: float | None = None,
    ) -> None:
        if num_layers < 0:
            raise ConfigurationError(f"num_layers is {num_layers}, expected a count")
        self.sensitivity = sensitivity
        self.maximum = maximum
        self.smoothing = smoothing
        self.initial = maximum if initial is None else initial
        self.values: list[float] = [self.initial] * num_layers

    def update(self, drop_rates: Sequence[float | None]) -> None:
        """Take one optimizer step's drop rates in [0, 1], one per layer; refuses anything else.

        A layer whose rate is None saw no token that counts, and keeps its coefficient.
        """
        if len(drop_rates) != len(self.values):
            raise ConfigurationError(f"{len(drop_rates)} drop rates for {len(self.values)} MoE layers")
        for layer, rate in enumerate(drop_rates, start=1):
            if rate is not None and not 0.0 <= rate <= 1.0:
                raise ConfigurationError(f"the drop rate of MoE layer {layer} is {rate}, expected 0 to 1")
        self.values = [
            value
            if rate is None
            else self.smoothing * value + (1.0 - self.smoothing) * min(self.sensitivity * rate, self.maximum)
            for value, rate in zip(self.values, drop_rates, strict=True)
        ]

    def state_dict(self) -> dict[str, Any]:
        """The coefficients in layer order."""
        return {"aux_loss_coefficients": list(self.values)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`; refuses a wrong number of layers and values that are not finite and >= 0."""
        values = [float(value) for value in state["aux_loss_coefficients"]]
        if len(values) != len(self.values):
            raise ConfigurationError(
                f"the checkpoint has auxiliary-loss coefficients for {len(values)} MoE layers, the model has"
                f" {len(self.values)}"
            )
        check_coefficients(dict(enumerate(values, start=1)))
        self.values = values


def check_coefficients(values: Mapping[int, float]) -> None:
    """Refuse coefficients, by layer number, that are not finite and >= 0."""
    for layer, value in values.items():
        if not (math.isfinite(value) and value >= 0.0):
            raise ConfigurationError(
                f"the checkpoint's auxiliary-loss coefficient of MoE layer {layer} is {value}, expected a"
                " finite number >= 0"
            )
