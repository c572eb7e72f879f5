"""The auxiliary load-balancing loss of eq. (4), and coefficients that adapt to the drop rate (eq. 7-9)."""

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
    """Compute eq. (4), coefficient * sum_j (1/n - P_j)^2, where P_j is the mean gate of expert j over `group`'s tokens.

    The value is this rank's share of the loss: the shares of the group's ranks add up to it. The gradient is that of
    the whole loss with respect to this rank's scores. Megatron's Switch form has the same convention.

    Args:
        scores: [tokens, n] gate values (softmax over all experts).
        total_tokens: Tokens of all ranks of the group.
        coefficient: alpha.
        group: The ranks that share a micro-batch (TP x CP).
    """
    # The sum is in float64, because the loss is a small difference of means near 1/n, and because its bits must not
    # depend on how tokens are spread over ranks.
    share = scores.sum(dim=0, dtype=torch.float64) / total_tokens
    mean_gate = reduce_from_tensor_model_parallel_region(share, group)
    loss = coefficient * (mean_gate - 1.0 / scores.shape[-1]).square().sum()
    return scale_value(loss, 1.0 / group.size())


def scale_value(loss: Tensor, factor: float) -> Tensor:
    """Multiply the value of `loss` by `factor`, and leave its gradient as it is."""
    return loss if factor == 1.0 else loss + (factor - 1.0) * loss.detach()


class AdaptiveAuxLossCoefficients:
    """One auxiliary-loss coefficient per MoE layer, which follows that layer's token drop rate (eq. 7-9).

    Each optimizer step computes estimate = min(sensitivity * drop_rate, maximum), and then
    coefficient = smoothing * coefficient + (1 - smoothing) * estimate. All of these are Python floats, so neither
    bf16 training nor a device changes them. The default constants are those of the report's section 4.2.

    Args:
        num_layers: Number of MoE layers, counted over the whole model.
        sensitivity: xi.
        maximum: alpha_max.
        smoothing: beta.
        initial: alpha_0, which the report does not give. With None they start at `maximum`, as in its Figure 4.
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
        """Update the coefficients from one optimizer step's drop rates.

        Args:
            drop_rates: One rate in [0, 1] for each layer. A layer whose rate is None saw no token that counts, and
                keeps its coefficient.

        Raises:
            ConfigurationError: The number of rates is not the number of layers, or a rate is outside [0, 1].
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
        """Continue from `state`.

        Raises:
            ConfigurationError: The number of layers differs, or a value is negative or not finite.
        """
        values = [float(value) for value in state["aux_loss_coefficients"]]
        if len(values) != len(self.values):
            raise ConfigurationError(
                f"the checkpoint has auxiliary-loss coefficients for {len(values)} MoE layers, the model has"
                f" {len(self.values)}"
            )
        check_coefficients(dict(enumerate(values, start=1)))
        self.values = values


def check_coefficients(values: Mapping[int, float]) -> None:
    """Refuse coefficients that are negative or not finite; `values` has them by layer number."""
    for layer, value in values.items():
        if not (math.isfinite(value) and value >= 0.0):
            raise ConfigurationError(
                f"the checkpoint's auxiliary-loss coefficient of MoE layer {layer} is {value}, expected a"
                " finite number >= 0"
            )
