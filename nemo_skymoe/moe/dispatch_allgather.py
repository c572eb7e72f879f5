"""EDP with sequence parallelism by all-gather and reduce-scatter, which sends the fewest bytes once k approaches n."""

from typing import Any

import torch
from megatron.core.transformer.moe.moe_utils import apply_router_token_dropping
from torch import Tensor

from nemo_skymoe.moe.collectives import (
    Exchange,
    begin_gather_from_group,
    begin_reduce_scatter_to_group,
    gather_assignments,
    hold,
)
from nemo_skymoe.moe.dispatcher import EdpTokenDispatcher, halves
from nemo_skymoe.moe.permutation import Permutation, by_capacity


class AllGatherTokenDispatcher(EdpTokenDispatcher):
    """Every rank gets all tokens of the group, and sums the outputs of its experts for them.

    Hidden states travel in the model's dtype both ways, although the router's weights are float32. K weights and K
    expert numbers per token travel with them. The routing map follows from the weights that are not zero. With
    `moe_capacity_scope="edp"` this class drops tokens, because it knows all tokens of the group.
    """

    kind = "allgather"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._drops = (
            self.config.moe_capacity_scope == "edp" and self.config.moe_expert_capacity_factor is not None
        )

    def dispatch_preprocess(
        self, tokens: Tensor, routing_map: Tensor, probs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the tokens as [t, H], and the weights of the local experts for all tokens of the group, [T, e]."""
        hidden_tH, weights_tE = super().dispatch_preprocess(tokens, routing_map, probs)
        weights_TK, experts_TK = gather_assignments(*self.assignments(weights_tE), self.ranks)
        weights_TE = self.spread(weights_TK, experts_TK)
        if self._drops:
            kept_TE = self._drop(weights_TE)
            # Once per micro-batch: the first pass of recomputation and evaluation run without gradients.
            if self.router.training and torch.is_grad_enabled() and self.config.moe_router_telemetry:
                self._observe_dropped(weights_TE, kept_TE)
            weights_TE = kept_TE
        return hidden_tH, weights_TE[:, self.local_experts]

    def split_weights(self, weights: Tensor) -> list[Tensor]:
        """Split the weights [T, e] as the tokens of each rank are split."""
        by_rank = weights.view(self.ranks.size, -1, self.num_local_experts)
        return [half.flatten(0, 1) for half in halves(by_rank, dim=1)]

    def begin_dispatch(self, hidden_states: Tensor, probs: Tensor) -> tuple[Exchange, Exchange]:
        """Begin to gather tokens [t, H] to [T, H]. The weights are there."""
        return begin_gather_from_group(hidden_states, self.ranks), hold(probs)

    def _drop(self, weights_TE: Tensor) -> Tensor:
        # The router of TP = 1 calls this same function on the same values in the same order, so the bits agree.
        kept, _ = apply_router_token_dropping(
            weights_TE,
            weights_TE.detach() != 0,
            router_topk=self.topk,
            capacity_factor=self.config.moe_expert_capacity_factor,
            drop_policy=self.config.moe_token_drop_policy,
        )
        return kept

    @torch.no_grad()
    def _observe_dropped(self, weights_TE: Tensor, kept_TE: Tensor) -> None:
        # The router leaves dropping to us. Each rank counts the assignments that its own experts do not take.
        dropped_Te = ((weights_TE != 0) & (kept_TE == 0))[:, self.local_experts]
        if self.router.valid_tokens is not None:
            valid_t1 = self.router.valid_tokens.mask_T1
            dropped_Te &= self.ranks.all_gather(valid_t1.to(torch.uint8)).bool()
        self.router.statistics.observe_dropped(dropped_Te.sum())

    def permutation(self, weights_Re: Tensor) -> Permutation:
        """Assign the tokens to local experts; with capacity padding the shapes are fixed."""
        if not self.padded:
            return super().permutation(weights_Re)
        segments = 1 if self._drops else self.ranks.size
        capacity = self.capacity(weights_Re.shape[0] // segments)
        return by_capacity(weights_Re, capacity, segments, self.fused)

    def begin_combine(self, hidden_states: Tensor) -> Exchange:
        """Begin to sum [T, H] over the ranks, of which this rank gets its tokens [t, H]."""
        return begin_reduce_scatter_to_group(hidden_states, self.ranks)
