"""EDP with sequence parallelism by all-gather and reduce-scatter: the fewest bytes once k approaches n."""

from typing import Any

import torch
from megatron.core.transformer.moe.moe_utils import apply_router_token_dropping
from torch import Tensor

from nemo_skymoe.moe.collectives import gather_assignments, gather_from_group, reduce_scatter_to_group
from nemo_skymoe.moe.dispatcher import EdpTokenDispatcher
from nemo_skymoe.moe.permutation import Permutation, by_capacity


class AllGatherTokenDispatcher(EdpTokenDispatcher):
    """Every rank gets all tokens of the group and sums what its experts make of them.

    Hidden states travel in the model's dtype both ways, although the router's weights are float32. Beside
    them go K weights and K expert numbers a token; the routing map is the non-zero weights. With
    `moe_capacity_scope="edp"` tokens are dropped here, where the whole group's are known.
    """

    kind = "allgather"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._drops = (
            self.config.moe_capacity_scope == "edp" and self.config.moe_expert_capacity_factor is not None
        )

    def token_dispatch(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """[t, H] to [T, H]; weights [t, E] to those of the local experts for all tokens, [T, e]."""
        weights_TK, experts_TK = gather_assignments(*self.assignments(probs), self.ranks)
        weights_TE = self.spread(weights_TK, experts_TK)
        if self._drops:
            kept_TE = self._drop(weights_TE)
            # Once per micro-batch: the first pass of recomputation and evaluation run without gradients.
            if self.router.training and torch.is_grad_enabled() and self.config.moe_router_telemetry:
                self._observe_dropped(weights_TE, kept_TE)
            weights_TE = kept_TE
        return gather_from_group(hidden_states, self.ranks), weights_TE[:, self.local_experts]

    def _drop(self, weights_TE: Tensor) -> Tensor:
        # The very function that the router of TP = 1 calls, on the same values in the same order.
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
        # For the router, which leaves dropping to us: the assignments that this rank's experts do not take.
        dropped_Te = ((weights_TE != 0) & (kept_TE == 0))[:, self.local_experts]
        if self.router.valid_tokens is not None:
            valid_t1 = self.router.valid_tokens.mask_T1
            dropped_Te &= self.ranks.all_gather(valid_t1.to(torch.uint8)).bool()
        self.router.statistics.observe_dropped(dropped_Te.sum())

    def permutation(self, weights_Re: Tensor) -> Permutation:
        """Which token goes to which local expert; fixed shapes with capacity padding."""
        if not self.padded:
            return super().permutation(weights_Re)
        segments = 1 if self._drops else self.ranks.size
        return by_capacity(weights_Re, self.capacity(weights_Re.shape[0] // segments), segments)

    def token_combine(self, hidden_states: Tensor) -> Tensor:
        """[T, H] to this rank's [t, H] of the sum over the ranks."""
        return reduce_scatter_to_group(hidden_states, self.ranks)
