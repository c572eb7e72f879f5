"""SkyworkRouter: normalised gate, adaptive auxiliary loss and telemetry as hooks of Megatron's TopKRouter.

Shape suffixes: S sequence, B micro-batch, T = S * B tokens, H hidden, E experts.
"""

from typing import Any, cast

import torch
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from nemo_skymoe.config import ConfigurationError, SkyworkOptions
from nemo_skymoe.moe.aux_loss import scale_value, squared_load_balancing_loss
from nemo_skymoe.moe.gating import normalize_gating_logits, tie_order
from nemo_skymoe.moe.telemetry import RouterStatistics


class SkyworkRouter(TopKRouter):
    """Megatron's top-k router with the report's gate (sec. 4.1) and per-layer auxiliary loss (sec. 4.2).

    `gating` returns normalised logits in float32 (float64 for a float64 model), so top-k, combine weights
    and auxiliary scores all see them; the z-loss sees the raw ones. With
    `moe_router_logit_norm_scale=None` this is the stock router with `moe_router_dtype="fp32"`, bit for bit.

    Attributes:
        aux_loss_coefficient: This layer's coefficient; a Python float set by the controller, constant
            within an optimizer step. None leaves Megatron's `moe_aux_loss_coeff` in force.
        statistics: Sums over the micro-batches seen in training since they were last taken.
    """

    aux_loss_coefficient: float | None = None
    statistics: RouterStatistics

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._set_up()

    @classmethod
    def adopt(cls, router: TopKRouter) -> "SkyworkRouter":
        """Turn a freshly built stock router into this class, in place.

        Megatron up to 0.15 builds its router itself; building a second one would draw from the random
        number generator again and change every later initialisation.
        """
        router.__class__ = cls
        adopted = cast(SkyworkRouter, router)
        adopted._set_up()
        return adopted

    def _set_up(self) -> None:
        options = cast(SkyworkOptions, self.config)
        if not isinstance(self.config, SkyworkOptions):
            raise ConfigurationError(
                f"SkyworkRouter needs a configuration with SkyworkOptions, got {type(self.config).__name__}"
            )
        self._scale = options.moe_router_logit_norm_scale
        self._raw_logits: Tensor | None = None
        self._gate_logits_TE: Tensor | None = None
        if options.moe_adaptive_aux_loss:
            initial = options.moe_adaptive_aux_loss_initial
            self.aux_loss_coefficient = options.moe_adaptive_aux_loss_maximum if initial is None else initial
        self.statistics = RouterStatistics(cast(int, self.config.num_moe_experts), self.topk)

    def gating(self, input: Tensor) -> Tensor:
        """Logits [S, B, E] of the router's input [S, B, H]: z~ = lambda (z - mean) / std (eq. 6)."""
        logits = self._raw_gating(input)
        if self._scale is not None:
            if self.config.moe_z_loss_coeff is not None and self.training and torch.is_grad_enabled():
                self._raw_logits = logits
            logits = self._normalize(logits)
        if self.training and torch.is_grad_enabled():
            self._gate_logits_TE = logits.detach().view(-1, logits.shape[-1])
        return logits

    def _raw_gating(self, input: Tensor) -> Tensor:
        double = input.dtype == torch.float64 or self.config.moe_router_dtype == "fp64"
        dtype = torch.float64 if double else torch.float32
        # Megatron 0.14 knows no gate bias.
        operands: list[Any] = [input, self.weight, *([self.bias] if hasattr(self, "bias") else []), dtype]
        return moe_utils.router_gating_linear(*operands)

    def _normalize(self, logits_SBE: Tensor) -> Tensor:
        options = cast(SkyworkOptions, self.config)
        assert self._scale is not None
        split = self.config.sequence_parallel
        ties = tie_order(
            *logits_SBE.shape,
            self.topk,
            tensor=(self.tp_group.rank(), self.tp_group.size()) if split else (0, 1),
            context=(self.cp_group.rank(), self.cp_group.size()),
            dtype=logits_SBE.dtype,
            device=logits_SBE.device,
        )
        return normalize_gating_logits(
            logits_SBE,
            self._scale,
            options.moe_router_logit_norm_correction,
            options.moe_router_logit_norm_eps,
            ties,
        )

    def apply_z_loss(self, logits: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Megatron's z-loss, on the raw logits; its value does not depend on the normalised ones."""
        raw, self._raw_logits = self._raw_logits, None
        if raw is None:
            return super().apply_z_loss(logits, *args, **kwargs)
        scale = self.tp_cp_group.size() if self.config.calculate_per_token_loss else 1
        penalised = super().apply_z_loss(_ScaleGradient.apply(raw.view_as(logits), scale), *args, **kwargs)
        return _CarryGradient.apply(logits, penalised)

    def is_aux_loss_enabled(self) -> bool:
        """Also true without an auxiliary loss: `_apply_aux_loss` is where the router is observed."""
        return self.routing_type != "sinkhorn"

    def get_aux_loss_coeff(self, aux_loss_type: str) -> float:
        """This layer's adaptive coefficient if it has one, else Megatron's; a Python float, never a tensor."""
        if self.aux_loss_coefficient is not None and self.routing_type == aux_loss_type:
            return self.aux_loss_coefficient
        return super().get_aux_loss_coeff(aux_loss_type)

    def _apply_aux_loss(
        self, probs: Tensor, scores_for_aux_loss: Tensor, routing_map: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        # Megatron calls this once per micro-batch in training, also with recomputation.
        logits_TE, self._gate_logits_TE = self._gate_logits_TE, None
        if logits_TE is not None and logits_TE.shape == scores_for_aux_loss.shape:
            routing_map = self._observe(logits_TE, scores_for_aux_loss.detach(), routing_map)
        coefficient = self.get_aux_loss_coeff("aux_loss")
        if coefficient == 0 or cast(SkyworkOptions, self.config).moe_aux_loss_form == "switch":
            return super()._apply_aux_loss(probs, scores_for_aux_loss, routing_map, *args, **kwargs)
        total_tokens = routing_map.shape[0] * self.tp_cp_group.size()
        loss = squared_load_balancing_loss(scores_for_aux_loss, total_tokens, coefficient, self.tp_cp_group)
        return self.attach_and_log_load_balancing_loss(
            probs, coefficient, loss, "load_balancing_loss", self.tp_cp_group
        )

    @torch.no_grad()
    def _observe(self, logits_TE: Tensor, scores_TE: Tensor, routing_map: Tensor) -> Tensor:
        """Count this micro-batch and return the map of the assignments before dropping.

        Megatron takes that map from the scores, where exact ties fall differently than in the logits that
        choose the experts.
        """
        num_tokens, num_experts = scores_TE.shape
        top = logits_TE.topk(min(max(self.topk, 3), num_experts), dim=-1)
        chosen = torch.zeros_like(routing_map).scatter_(1, top.indices[:, : self.topk], True)
        # Padding tokens, which Megatron 0.16 leaves out of its map, stay out.
        chosen &= routing_map.any(dim=-1, keepdim=True)
        factor = self.config.moe_expert_capacity_factor
        if factor is None:
            factor = cast(SkyworkOptions, self.config).moe_nominal_capacity_factor
        capacity = moe_utils.get_capacity(num_tokens * self.topk, num_experts, factor)
        self.statistics.observe(logits_TE, scores_TE, top.values, chosen.sum(dim=0), capacity)
        return chosen

    def attach_and_log_load_balancing_loss(
        self, activation: Tensor, aux_loss_coeff: float, aux_loss: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        """As Megatron's, observed, and independent of TP x CP under `calculate_per_token_loss`."""
        group_size = self.tp_cp_group.size()
        self.statistics.observe_aux_loss(aux_loss / aux_loss_coeff, group_size)
        if self.config.calculate_per_token_loss:
            # Megatron up to 0.18 multiplies by this rank's tokens only, but divides by those of the group.
            aux_loss = scale_value(aux_loss * group_size, 1.0 / group_size)
        return super().attach_and_log_load_balancing_loss(
            activation, aux_loss_coeff, aux_loss, *args, **kwargs
        )


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        return gradients[0] * ctx.factor, None


class _CarryGradient(torch.autograd.Function):
    """Return the first tensor; let losses attached to the second take part in the backward pass."""

    @staticmethod
    def forward(ctx, tensor: Tensor, carried: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        return gradients[0], torch.zeros_like(gradients[0])
