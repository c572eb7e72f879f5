"""SkyworkRouter: normalised gate, adaptive auxiliary loss and telemetry as hooks of Megatron's TopKRouter.

Shape suffixes: S sequence, B micro-batch, T = S * B tokens, H hidden, E experts.
"""

import functools
import logging
from typing import Any, cast

import megatron.core
import torch
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, save_to_aux_losses_tracker
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from nemo_skymoe.config import ConfigurationError, SkyworkOptions
from nemo_skymoe.moe.adoption import adopt
from nemo_skymoe.moe.aux_loss import squared_load_balancing_loss
from nemo_skymoe.moe.capacity import with_capacity_in_reach
from nemo_skymoe.moe.gate import add_gate_parameters, gate_logits
from nemo_skymoe.moe.gating import normalize_and_break_ties, tie_order
from nemo_skymoe.moe.gradients import CarryGradient, ScaleGradient
from nemo_skymoe.moe.padding import ToldPadding, ValidTokens, sum_over
from nemo_skymoe.moe.telemetry import RouterStatistics

logger = logging.getLogger(__name__)

# Below any effect in float32. A coefficient of zero would take the layer out of Megatron's loss log, whose
# reduction over the pipeline waits for every stage.
_LEAST_COEFFICIENT = 1e-12


class SkyworkRouter(TopKRouter):
    """Megatron's top-k router with the report's gate (sec. 4.1) and per-layer auxiliary loss (sec. 4.2).

    `gating` returns normalised logits in float32 (float64 for a float64 model), so top-k, combine weights
    and auxiliary scores all see them; the z-loss sees the raw ones. With
    `moe_router_logit_norm_scale=None` this is the stock router with `moe_router_dtype="fp32"`, bit for bit.
    A token of equal logits gets the experts of `gating.tie_order`; with `moe_router_pre_softmax`, which top-1
    needs, those that Megatron takes among equal scores.

    Attributes:
        aux_loss_coefficient: This layer's coefficient; a Python float set by the controller, constant
            within an optimizer step. None leaves Megatron's `moe_aux_loss_coeff` in force.
        statistics: Sums over the micro-batches seen in training since they were last taken.
        told_padding: Padding masks from outside the model, see `padding.padding_told`.
        valid_tokens: Which tokens of the last micro-batch are no padding; None where none is.
    """

    aux_loss_coefficient: float | None = None
    statistics: RouterStatistics
    told_padding: ToldPadding
    valid_tokens: ValidTokens | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._set_up()

    @classmethod
    def adopt(cls, router: TopKRouter) -> "SkyworkRouter":
        """Turn a freshly built stock router into one of this class, in place; its weights stay what they are."""
        adopted = adopt(router, cls)
        adopted._set_up()
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
        self.config = with_capacity_in_reach(self.config)
        options = self._options
        add_gate_parameters(self)
        if options.moe_adaptive_aux_loss:
            initial = options.moe_adaptive_aux_loss_initial
            self.aux_loss_coefficient = options.moe_adaptive_aux_loss_maximum if initial is None else initial
        self.statistics = RouterStatistics(cast(int, self.config.num_moe_experts))
        self.told_padding = ToldPadding()
        # What one call of `forward` leaves for the hooks that Megatron calls later in it.
        self._raw_logits: Tensor | None = None
        self._equal_rows: tuple[Tensor, Tensor] | None = None
        self._gate_logits_TE: Tensor | None = None

    @property
    def _options(self) -> SkyworkOptions:
        return cast(SkyworkOptions, self.config)

    def _is_training(self) -> bool:
        """True once per micro-batch: the first pass of recomputation runs without gradients, as does evaluation."""
        return self.training and torch.is_grad_enabled()

    def gating(self, input: Tensor) -> Tensor:
        """Logits [S, B, E] of the router's input [S, B, H]: z~ = lambda (z - mean) / std (eq. 6)."""
        raw_SBE = gate_logits(self, input)
        options = self._options
        if options.moe_router_logit_norm_scale is None:
            return raw_SBE
        ties_SBE, choice_SBE = self._tie_order(raw_SBE)
        logits_SBE, equal_SB1 = normalize_and_break_ties(
            raw_SBE,
            options.moe_router_logit_norm_scale,
            options.moe_router_logit_norm_correction,
            options.moe_router_logit_norm_eps,
            ties_SBE,
        )
        if self._is_training():
            self._raw_logits = raw_SBE
            if not self.config.moe_router_pre_softmax:  # where the choice is among equal scores, Megatron's
                self._equal_rows = equal_SB1.flatten(0, 1), choice_SBE.flatten(0, 1)
        return logits_SBE

    def _tie_order(self, logits_SBE: Tensor) -> tuple[Tensor, Tensor]:
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
        """Weights and map, both [T, E], of logits [S, B, E]; padding takes part in no loss and no count.

        Args:
            logits: Gating logits.
            padding_mask: [S, B], True for padding. Megatron passes it on from 0.16; `padding.padding_told` tells
                it in every version.
        """
        if padding_mask is None and self.training:
            padding_mask = self._padding_told(*logits.shape[:2])
        self.valid_tokens = None
        if padding_mask is not None and self._is_training():
            self.valid_tokens = ValidTokens(~padding_mask.bool().reshape(-1, 1), self.tp_cp_group)
        self._num_sequences = logits.shape[1]
        # Megatron's own treatment of padding differs between versions, and up to 0.15 there is none.
        probs, routing_map = super().routing(logits)
        if self._drops_tokens and self._is_training():
            self._observe_dropped(probs.detach(), routing_map)
        return probs, routing_map

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
        """Megatron's z-loss, on the raw logits; its value does not depend on the normalised ones.

        It is the mean over the micro-batch's tokens without padding, however they are spread over ranks, and under
        `calculate_per_token_loss` their sum.
        """
        raw, self._raw_logits = self._raw_logits, None
        if not self._is_training():
            return logits
        if self._options.moe_router_telemetry:
            self._gate_logits_TE = logits.detach()
        if self.config.moe_z_loss_coeff is None or logits.shape[0] == 0:  # a mean over no tokens
            return logits
        penalised = logits if raw is None else raw.view_as(logits)
        if self.valid_tokens is not None:
            return CarryGradient.apply(logits, self._attach_padded_z_loss(penalised, self.valid_tokens))
        scale = self.tp_cp_group.size() if self.config.calculate_per_token_loss else 1
        if raw is None and scale == 1:
            return super().apply_z_loss(logits, *args, **kwargs)
        penalised = super().apply_z_loss(ScaleGradient.apply(penalised, scale), *args, **kwargs)
        return CarryGradient.apply(logits, penalised)

    def _attach_padded_z_loss(self, logits_TE: Tensor, valid: ValidTokens) -> Tensor:
        """Megatron takes the mean of each rank and then of the ranks, whichever share of the padding they have."""
        config: Any = self.config
        squares_T1 = logits_TE.logsumexp(dim=-1, keepdim=True).square() * valid.mask_T1
        share = squares_T1.sum() / valid.group_count
        layer_number: Any = self.layer_number
        save_to_aux_losses_tracker("z_loss", share * self.tp_cp_group.size(), layer_number, config.num_layers)
        loss = share * config.moe_z_loss_coeff
        if config.calculate_per_token_loss:
            loss = loss * valid.group_count
        return cast(Tensor, MoEAuxLossAutoScaler.apply(logits_TE, loss))

    def is_aux_loss_enabled(self) -> bool:
        """Also true without an auxiliary loss: `_apply_aux_loss` is where the router is observed."""
        return self._options.moe_router_telemetry or super().is_aux_loss_enabled()

    def get_aux_loss_coeff(self, aux_loss_type: str) -> float:
        """This layer's adaptive coefficient if it has one, else Megatron's; a Python float, never a tensor."""
        if self.aux_loss_coefficient is not None and self.routing_type == aux_loss_type:
            return max(self.aux_loss_coefficient, _LEAST_COEFFICIENT)
        return super().get_aux_loss_coeff(aux_loss_type)

    def _apply_aux_loss(
        self, probs: Tensor, scores_for_aux_loss: Tensor, routing_map: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        # The first of Megatron's auxiliary losses, called in training only. All of them get this map of the
        # assignments before dropping, so it is put right in place.
        self._assign_equal_rows(routing_map)
        if self.valid_tokens is not None:
            routing_map.logical_and_(self.valid_tokens.mask_T1)
        scores_for_aux_loss = self._without_padding(scores_for_aux_loss)
        self._observe(scores_for_aux_loss.detach(), routing_map)
        coefficient = self.get_aux_loss_coeff("aux_loss")
        if coefficient == 0:
            return probs
        if self._options.moe_aux_loss_form == "square":
            return self._apply_squared_loss(probs, scores_for_aux_loss, coefficient)
        if routing_map.shape[0] == 0:
            # The other ranks of the group wait for this one's share.
            reduce_from_tensor_model_parallel_region(routing_map.sum(dim=0), self.tp_cp_group)
            return probs
        return super()._apply_aux_loss(probs, scores_for_aux_loss, routing_map, *args, **kwargs)

    def _apply_seq_aux_loss(
        self, probs: Tensor, scores_for_aux_loss: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        return super()._apply_seq_aux_loss(probs, self._without_padding(scores_for_aux_loss), *args, **kwargs)

    def _apply_global_aux_loss(
        self, probs: Tensor, scores_for_aux_loss: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        return super()._apply_global_aux_loss(
            probs, self._without_padding(scores_for_aux_loss), *args, **kwargs
        )

    def _without_padding(self, scores_TE: Tensor) -> Tensor:
        return scores_TE if self.valid_tokens is None else scores_TE * self.valid_tokens.mask_T1

    def _apply_squared_loss(self, probs: Tensor, scores_TE: Tensor, coefficient: float) -> Tensor:
        total_tokens: int | Tensor = max(scores_TE.shape[0] * self.tp_cp_group.size(), 1)
        if self.valid_tokens is not None:
            total_tokens = self.valid_tokens.group_count
        loss = squared_load_balancing_loss(scores_TE, total_tokens, coefficient, self.tp_cp_group)
        return self.attach_and_log_load_balancing_loss(
            probs, coefficient, loss, "load_balancing_loss", self.tp_cp_group, without_padding=True
        )

    @torch.no_grad()
    def _assign_equal_rows(self, routing_map: Tensor) -> None:
        """Megatron takes the map from the scores, where a tie falls differently than in the logits."""
        equal_rows, self._equal_rows = self._equal_rows, None
        if equal_rows is not None and not self.config.moe_router_force_load_balancing:
            equal_T1, choice_TE = equal_rows
            if equal_T1.is_cpu and not equal_T1.any():  # a GPU would have to be waited for
                return
            torch.where(equal_T1, choice_TE, routing_map, out=routing_map)

    @property
    def _drops_tokens(self) -> bool:
        """Whether this router drops: under `moe_capacity_scope="edp"` the dispatcher does."""
        return self.config.moe_expert_capacity_factor is not None

    @torch.no_grad()
    def _observe(self, scores_TE: Tensor, routing_map: Tensor) -> None:
        logits_TE, self._gate_logits_TE = self._gate_logits_TE, None
        if logits_TE is None:
            return
        capacity = None
        if not self._drops_tokens and self._options.moe_capacity_scope == "rank":
            capacity = self._nominal_capacity(scores_TE.shape[0])
        valid_T1 = None if self.valid_tokens is None else self.valid_tokens.mask_T1
        self.statistics.observe(
            logits_TE, scores_TE, routing_map.sum(dim=0), capacity, valid_T1, self._num_sequences
        )

    def _nominal_capacity(self, num_tokens: int) -> int | Tensor:
        factor, experts = self._options.moe_nominal_capacity_factor, cast(int, self.config.num_moe_experts)
        if self.valid_tokens is None:
            return moe_utils.get_capacity(num_tokens * self.topk, experts, factor)
        return (self.valid_tokens.count * self.topk / experts * factor).ceil()

    @torch.no_grad()
    def _observe_dropped(self, probs_TE: Tensor, routing_map: Tensor) -> None:
        """What was really dropped: padding competes for capacity, so it does not follow from the valid load."""
        if not self._options.moe_router_telemetry:
            return
        # With capacity padding the map has places that nobody was assigned to; they have no weight.
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
        """As Megatron's, observed, without padding, and independent of TP x CP under `calculate_per_token_loss`.

        `without_padding` says that the loss is one of the tokens without padding already; Megatron's are of all.
        """
        if not without_padding:
            aux_loss = self._loss_without_padding(activation, aux_loss, reduce_group)
        self.statistics.observe_aux_loss(aux_loss / aux_loss_coeff, reduce_group.size())
        if self.config.calculate_per_token_loss:
            # Megatron up to 0.18 multiplies by this rank's tokens, but divides by those of the group.
            of_group: int | Tensor = self.tp_cp_group.size()
            if self.valid_tokens is not None:
                of_group = self.valid_tokens.group_count / max(activation.shape[0], 1)
            aux_loss = ScaleGradient.apply(aux_loss, of_group)
            # 0.16 counts the positions of a micro-batch as its tokens in the loss over sequences.
            kwargs.pop("valid_token_count", None)
        return super().attach_and_log_load_balancing_loss(
            activation, aux_loss_coeff, aux_loss, aux_loss_name, reduce_group, *args, **kwargs
        )

    def _loss_without_padding(
        self, activation: Tensor, aux_loss: Tensor, reduce_group: torch.distributed.ProcessGroup
    ) -> Tensor:
        over_the_batch = reduce_group is not self.tp_cp_group
        # Of the data-parallel ranks that share a loss over the whole batch, others may have padding.
        if self.valid_tokens is not None or over_the_batch:
            # Megatron's losses are sums over tokens divided by the square of their number.
            tokens = activation.shape[0] * reduce_group.size()
            aux_loss = aux_loss * (tokens / self._valid_in(reduce_group, activation).double()) ** 2
        if over_the_batch:
            # Each rank has its share of that loss, of whose gradients Megatron then takes the mean, not the sum.
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
