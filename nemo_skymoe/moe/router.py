"""SkyworkRouter adds the normalised gate, the adaptive auxiliary loss and telemetry to Megatron's TopKRouter.

Shape suffixes: S sequence, B micro-batch, T = S * B tokens, H hidden, E experts.
"""

import copy
import functools
import logging
from typing import Any, cast

import megatron.core
import torch
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.moe_utils import (
    MoEAuxLossAutoScaler,
    apply_router_token_dropping,
    save_to_aux_losses_tracker,
)
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from nemo_skymoe.config import ConfigurationError, SkyworkOptions
from nemo_skymoe.moe.adoption import adopt
from nemo_skymoe.moe.aux_loss import squared_load_balancing_loss
from nemo_skymoe.moe.capacity import with_capacity_in_reach
from nemo_skymoe.moe.gate import add_gate_parameters, gate_logits, sum_gradients_over_tokens
from nemo_skymoe.moe.gating import normalize_and_break_ties, tie_order
from nemo_skymoe.moe.gradients import CarryGradient, ScaleGradient
from nemo_skymoe.moe.kept_reads import KeptReads
from nemo_skymoe.moe.padding import ToldPadding, ValidTokens, sum_over
from nemo_skymoe.moe.telemetry import RouterStatistics, gate_shape

logger = logging.getLogger(__name__)

# This coefficient has no effect in float32. A coefficient of zero would take the layer out of Megatron's loss log,
# whose reduction over the pipeline waits for every stage.
_LEAST_COEFFICIENT = 1e-12


class SkyworkRouter(TopKRouter):
    """Megatron's top-k router with the report's gate (sec. 4.1) and per-layer auxiliary loss (sec. 4.2).

    `gating` returns normalised logits in float32 (float64 for a float64 model), so top-k, combine weights and
    auxiliary scores all see them. The z-loss sees the raw ones. With `moe_router_logit_norm_scale=None` this is
    Megatron's router with `moe_router_dtype="fp32"`, bit for bit. A token with equal logits gets the experts of
    `gating.tie_order`. With `moe_router_pre_softmax`, which top-1 needs, it gets those that Megatron takes among equal
    scores.

    The auxiliary losses of normalised logits and the telemetry see the experts that the top-k chose, where Megatron
    chooses a second time, among the scores: five kernels more, and other experts where scores round to one number.

    Attributes:
        capacity_factor: The capacity factor by which this router drops assignments; None if it drops none.
        aux_loss_coefficient: This layer's coefficient, a Python float that the controller sets and that is constant
            within an optimizer step. If it is None, Megatron's `moe_aux_loss_coeff` applies.
        statistics: Sums over the micro-batches of training since they were last taken.
        told_padding: Padding masks from outside the model, see `padding.padding_told`.
        kept_reads: What the host has read for the layer's dispatcher and recomputation will ask for again.
        valid_tokens: The tokens of the last micro-batch that are not padding; None without padding.
    """

    capacity_factor: float | None = None
    aux_loss_coefficient: float | None = None
    statistics: RouterStatistics
    told_padding: ToldPadding
    kept_reads: KeptReads
    valid_tokens: ValidTokens | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._set_up()
        sum_gradients_over_tokens(self)

    @classmethod
    def adopt(cls, router: TopKRouter) -> "SkyworkRouter":
        """Turn a freshly built router of Megatron's into one of this class, in place, without changing its weights."""
        adopted = adopt(router, cls)
        adopted._set_up()
        sum_gradients_over_tokens(adopted)
        return adopted

    def _set_up(self) -> None:
        if not isinstance(self.config, SkyworkOptions):
            raise ConfigurationError(
                f"SkyworkRouter needs a configuration with SkyworkOptions, got {type(self.config).__name__}"
            )
        if "global_aux_loss" in self.routing_type and not hasattr(TopKRouter, "_apply_global_aux_loss"):
            raise ConfigurationError(
                f"moe_router_load_balancing_type is {self.routing_type!r}, but Megatron-Core"
                f" {megatron.core.__version__} has no global_aux_loss: it came with 0.15"
            )
        if "global_aux_loss" in self.routing_type:
            _warn_of_running_mean()
        self.capacity_factor = with_capacity_in_reach(self.config).moe_expert_capacity_factor
        # Megatron's routing drops before its losses, which then could not see all assignments. It has to leave that.
        self.config = copy.copy(self.config)
        self.config.moe_expert_capacity_factor = None
        # Megatron up to 0.18 multiplies per-token losses by this rank's tokens, later ones by those of the group, and
        # 0.16 by the positions of a sequence. Told that losses are means, all of them leave that to this class.
        self.calculate_per_token_loss = False
        options = self._options
        add_gate_parameters(self)
        if options.moe_adaptive_aux_loss:
            initial = options.moe_adaptive_aux_loss_initial
            self.aux_loss_coefficient = options.moe_adaptive_aux_loss_maximum if initial is None else initial
        self.statistics = RouterStatistics(cast(int, self.config.num_moe_experts))
        self.told_padding = ToldPadding()
        self.kept_reads = KeptReads()
        # `gating` leaves these for the methods that Megatron calls later in the same forward pass.
        self._raw_logits: Tensor | None = None
        self._logits_TE: Tensor | None = None

    @property
    def _options(self) -> SkyworkOptions:
        return cast(SkyworkOptions, self.config)

    def forget_micro_batches(self) -> None:
        """Forget what was kept for backward passes, of which none is left."""
        self.told_padding.forget()
        self.kept_reads.forget()

    def _is_training(self) -> bool:
        """True once per micro-batch: evaluation and the first pass of recomputation run without gradients."""
        return self.training and torch.is_grad_enabled()

    def gating(self, input: Tensor) -> Tensor:
        """Compute the logits [S, B, E] of the router's input [S, B, H]: z~ = lambda (z - mean) / std (eq. 6)."""
        raw_SBE = gate_logits(self, input)
        options = self._options
        if options.moe_router_logit_norm_scale is None:
            return raw_SBE
        self._raw_logits = raw_SBE if self._is_training() else None
        return normalize_and_break_ties(
            raw_SBE,
            options.moe_router_logit_norm_scale,
            options.moe_router_logit_norm_correction,
            options.moe_router_logit_norm_eps,
            self._tie_order(raw_SBE),
        )

    def _tie_order(self, logits_SBE: Tensor) -> Tensor:
        split = self.config.sequence_parallel
        return tie_order(
            *logits_SBE.shape,
            self.topk,
            tensor=(self.tp_group.rank(), self.tp_group.size()) if split else (0, 1),
            context=(self.cp_group.rank(), self.cp_group.size()),
            dtype=logits_SBE.dtype,
            device=logits_SBE.device,
        )

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Compute the weights and the routing map, both [T, E]. Padding takes part in no loss and no count.

        Args:
            logits: Gating logits [S, B, E].
            padding_mask: [S, B], True for padding. Megatron passes it on from 0.16. `padding.padding_told` passes it
                in every version.
        """
        if padding_mask is None and self.training:
            padding_mask = self._padding_told(*logits.shape[:2])
        self.valid_tokens = None
        if padding_mask is not None and self._is_training():
            self.valid_tokens = ValidTokens(~padding_mask.bool().reshape(-1, 1), self.tp_cp_group)
        self._num_sequences = logits.shape[1]
        self._logits_TE = logits.detach().flatten(0, 1)
        # Megatron's own treatment of padding differs between versions, and up to 0.15 there is none.
        probs, routing_map = super().routing(logits)
        if self._is_training() and self._normalises and self._has_aux_loss():
            probs = self._apply_aux_losses(probs, logits, routing_map)
        self._logits_TE = None
        if self.capacity_factor is not None:
            probs, routing_map = apply_router_token_dropping(
                probs,
                routing_map,
                router_topk=self.topk,
                capacity_factor=self.capacity_factor,
                drop_policy=self.config.moe_token_drop_policy,
                pad_to_capacity=self.config.moe_pad_expert_input_to_capacity,
            )
            if self._is_training():
                self._observe_dropped(probs.detach(), routing_map)
        return probs, routing_map

    def _apply_aux_losses(self, probs: Tensor, logits_SBE: Tensor, routing_map: Tensor) -> Tensor:
        """Attach the auxiliary losses as Megatron's routing does, but of the experts that its top-k chose."""
        scores_TE = torch.softmax(logits_SBE.flatten(0, 1), dim=-1, dtype=torch.float32)
        probs = self._apply_aux_loss(probs, scores_TE, routing_map)
        probs = self._apply_seq_aux_loss(probs, scores_TE, routing_map, *logits_SBE.shape[:2])
        if hasattr(TopKRouter, "_apply_global_aux_loss"):
            probs = self._apply_global_aux_loss(probs, scores_TE, routing_map)
        return probs

    def _padding_told(self, sequence: int, batch: int) -> Tensor | None:
        mask_BS = self.told_padding.of_this_pass()
        if mask_BS is None:
            return None
        mask_SB = mask_BS.t()
        if self.config.sequence_parallel:
            mask_SB = mask_SB.chunk(self.tp_group.size())[self.tp_group.rank()]
        if mask_SB.shape != (sequence, batch):
            raise ConfigurationError(
                f"the padding mask told to MoE layer {self.layer_number} is {list(mask_BS.shape)}, of which this rank's"
                f" part is {list(mask_SB.t().shape)}; expected the micro-batch's {[batch, sequence]}"
            )
        return mask_SB

    def apply_z_loss(self, logits: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Attach Megatron's z-loss of the raw logits, because normalised logits have no size left to penalise.

        It is the mean over the micro-batch's tokens without padding, however they are spread over ranks. Under
        `calculate_per_token_loss` it is their sum.
        """
        raw, self._raw_logits = self._raw_logits, None
        if not self._is_training() or self.config.moe_z_loss_coeff is None:
            return logits
        if logits.shape[0] == 0:  # a mean over no tokens
            return logits
        penalised = logits if raw is None else raw.view_as(logits)
        if self.valid_tokens is not None:
            return CarryGradient.apply(logits, self._attach_padded_z_loss(penalised, self.valid_tokens))
        scale = self._tokens_of_group(logits) if self.config.calculate_per_token_loss else 1
        if raw is None and scale == 1:
            return super().apply_z_loss(logits, *args, **kwargs)
        penalised = super().apply_z_loss(ScaleGradient.apply(penalised, scale), *args, **kwargs)
        return CarryGradient.apply(logits, penalised)

    def _tokens_of_group(self, tokens_TX: Tensor) -> int | Tensor:
        """Return the number of tokens, without padding, of the ranks that share this rank's micro-batch."""
        if self.valid_tokens is not None:
            return self.valid_tokens.group_count
        return tokens_TX.shape[0] * self.tp_cp_group.size()

    def _attach_padded_z_loss(self, logits_TE: Tensor, valid: ValidTokens) -> Tensor:
        """Attach the z-loss without padding. Megatron's mean of the ranks' means would ignore how padding is spread."""
        config: Any = self.config
        squares_T1 = logits_TE.logsumexp(dim=-1, keepdim=True).square() * valid.mask_T1
        share = squares_T1.sum() / valid.group_count
        layer_number: Any = self.layer_number
        logged = share * self.tp_cp_group.size()
        group: Any = getattr(self, "tp_dp_cp_group", None)  # 0.14 has none
        save_to_aux_losses_tracker("z_loss", logged, layer_number, config.num_layers, avg_group=group)
        loss = share * config.moe_z_loss_coeff
        if config.calculate_per_token_loss:
            loss = loss * valid.group_count
        return cast(Tensor, MoEAuxLossAutoScaler.apply(logits_TE, loss))

    def is_aux_loss_enabled(self) -> bool:
        """Say whether Megatron's routing is to apply the auxiliary losses: with normalised logits this class does it."""
        return not self._normalises and self._has_aux_loss()

    def _has_aux_loss(self) -> bool:
        """Say whether `_apply_aux_loss` has to be called. Telemetry needs that also without an auxiliary loss."""
        return self._options.moe_router_telemetry or super().is_aux_loss_enabled()

    def get_aux_loss_coeff(self, aux_loss_type: str) -> float:
        """Return this layer's adaptive coefficient if it has one, else Megatron's: a Python float, never a tensor."""
        if self.aux_loss_coefficient is not None and self.routing_type == aux_loss_type:
            return max(self.aux_loss_coefficient, _LEAST_COEFFICIENT)
        return super().get_aux_loss_coeff(aux_loss_type)

    def _apply_aux_loss(
        self, probs: Tensor, scores_for_aux_loss: Tensor, routing_map: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        scores_TE, assigned_TE = self._without_padding(scores_for_aux_loss, routing_map)
        self._observe(scores_TE.detach(), assigned_TE)
        coefficient = self.get_aux_loss_coeff("aux_loss")
        if coefficient == 0:
            return probs
        if self._options.moe_aux_loss_form == "square":
            return self._apply_squared_loss(probs, scores_TE, coefficient)
        if assigned_TE.shape[0] == 0:
            # A rank without tokens takes part in the reduction, because the others wait for it.
            reduce_from_tensor_model_parallel_region(assigned_TE.sum(dim=0), self.tp_cp_group)
            return probs
        return super()._apply_aux_loss(probs, scores_TE, assigned_TE, *args, **kwargs)

    def _apply_seq_aux_loss(
        self, probs: Tensor, scores_for_aux_loss: Tensor, routing_map: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        valid = self._without_padding(scores_for_aux_loss, routing_map)
        return super()._apply_seq_aux_loss(probs, *valid, *args, **kwargs)

    def _apply_global_aux_loss(
        self, probs: Tensor, scores_for_aux_loss: Tensor, routing_map: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        valid = self._without_padding(scores_for_aux_loss, routing_map)
        return super()._apply_global_aux_loss(probs, *valid, *args, **kwargs)

    def _without_padding(self, scores_TE: Tensor, assigned_TE: Tensor) -> tuple[Tensor, Tensor]:
        if self.valid_tokens is None:
            return scores_TE, assigned_TE
        return scores_TE * self.valid_tokens.mask_T1, assigned_TE & self.valid_tokens.mask_T1

    def _apply_squared_loss(self, probs: Tensor, scores_TE: Tensor, coefficient: float) -> Tensor:
        total_tokens: int | Tensor = max(scores_TE.shape[0] * self.tp_cp_group.size(), 1)
        if self.valid_tokens is not None:
            total_tokens = self.valid_tokens.group_count
        loss = squared_load_balancing_loss(scores_TE, total_tokens, coefficient, self.tp_cp_group)
        return self.attach_and_log_load_balancing_loss(
            probs, coefficient, loss, "load_balancing_loss", self.tp_cp_group, without_padding=True
        )

    @property
    def _normalises(self) -> bool:
        return self._options.moe_router_logit_norm_scale is not None

    @torch.no_grad()
    def _observe(self, scores_TE: Tensor, assigned_TE: Tensor) -> None:
        if not self._options.moe_router_telemetry:
            return
        capacity = None
        if self.capacity_factor is None and self._options.moe_capacity_scope == "rank":
            capacity = self._nominal_capacity(scores_TE.shape[0])
        valid_T1 = None if self.valid_tokens is None else self.valid_tokens.mask_T1
        shape = gate_shape(cast(Tensor, self._logits_TE), scores_TE, valid_T1, self._num_sequences)
        self.statistics.observe(assigned_TE.sum(dim=0), capacity, shape)

    def _nominal_capacity(self, num_tokens: int) -> int | Tensor:
        factor, experts = self._options.moe_nominal_capacity_factor, cast(int, self.config.num_moe_experts)
        if self.valid_tokens is None:
            return moe_utils.get_capacity(num_tokens * self.topk, experts, factor)
        return (self.valid_tokens.count * self.topk / experts * factor).ceil()

    @torch.no_grad()
    def _observe_dropped(self, probs_TE: Tensor, routing_map: Tensor) -> None:
        """Count the assignments that were dropped. Padding competes for capacity, so the valid load does not tell."""
        if not self._options.moe_router_telemetry:
            return
        # With capacity padding the map also has empty places, whose weight is zero.
        kept_TE = probs_TE != 0 if self.config.moe_pad_expert_input_to_capacity else routing_map
        if self.valid_tokens is None:
            assigned = probs_TE.shape[0] * self.topk
        else:
            kept_TE = kept_TE & self.valid_tokens.mask_T1
            assigned = self.valid_tokens.count * self.topk
        self.statistics.observe_dropped(assigned - kept_TE.sum())

    def attach_and_log_load_balancing_loss(
        self,
        activation: Tensor,
        aux_loss_coeff: float,
        aux_loss: Tensor,
        aux_loss_name: str,
        reduce_group: torch.distributed.ProcessGroup,
        *args: Any,
        without_padding: bool = False,
        **kwargs: Any,
    ) -> Tensor:
        """Attach a loss as Megatron does, after observing it and correcting it for padding and for per-token losses.

        Under `calculate_per_token_loss` the result does not depend on the sizes TP and CP.

        Args:
            activation: This and the next four arguments are Megatron's.
            without_padding: True if the loss already leaves out padding. Megatron's own losses do not.
        """
        if not without_padding:
            aux_loss = self._loss_without_padding(activation, aux_loss, reduce_group)
        self.statistics.observe_aux_loss(aux_loss, aux_loss_coeff, reduce_group.size())
        if self.config.calculate_per_token_loss:
            aux_loss = ScaleGradient.apply(aux_loss, self._tokens_of_group(activation))
        return super().attach_and_log_load_balancing_loss(
            activation, aux_loss_coeff, aux_loss, aux_loss_name, reduce_group, *args, **kwargs
        )

    def _loss_without_padding(
        self, activation: Tensor, aux_loss: Tensor, reduce_group: torch.distributed.ProcessGroup
    ) -> Tensor:
        over_the_batch = reduce_group is not self.tp_cp_group
        # In a loss over the whole batch, other data-parallel ranks may have padding even if this one has none.
        if self.valid_tokens is not None or over_the_batch:
            # Megatron's losses are products of two sums over tokens, each divided by the number of tokens.
            tokens = activation.shape[0] * reduce_group.size()
            aux_loss = aux_loss * (tokens / self._valid_in(reduce_group, activation).double()) ** 2
        if over_the_batch:
            # Each rank has its share of that loss. Megatron takes the mean of the shares' gradients instead of the sum.
            aux_loss = ScaleGradient.apply(aux_loss, reduce_group.size() // self.tp_cp_group.size())
        return aux_loss

    def _valid_in(self, group: torch.distributed.ProcessGroup, activation: Tensor) -> Tensor:
        if self.valid_tokens is None:
            count = torch.full((), activation.shape[0], dtype=torch.int64, device=activation.device)
        elif group is self.tp_cp_group:
            return self.valid_tokens.group_count
        else:
            count = self.valid_tokens.count
        return sum_over(count, group).clamp_min(1)


@functools.cache
def _warn_of_running_mean() -> None:
    if torch.distributed.get_rank() == 0:
        logger.warning(
            "moe_router_load_balancing_type='global_aux_loss' balances against a running mean over the micro-batches"
            " of a step, as Megatron defines it. Its gradient therefore depends on how a batch is divided into"
            " micro-batches and over data-parallel ranks: by a quarter to two thirds at 32 tokens a micro-batch"
            " (docs/monitor.md). The gradient of 'aux_loss' does not."
        )
