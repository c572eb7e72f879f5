"""What the EDP token dispatchers share: order by expert, and weights in a form worth sending.

Shape suffixes: t tokens of this rank, T tokens of the group, K picked experts, E experts, e local experts,
H hidden.
"""

from typing import Any, ClassVar

import torch
from megatron.core.transformer.moe.moe_utils import get_capacity
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher
from torch import Tensor

from nemo_skymoe.moe.collectives import ExpertGroup
from nemo_skymoe.moe.permutation import Permutation, by_expert


class EdpTokenDispatcher(MoETokenDispatcher):
    """Megatron's stages; a subclass says how rows reach the experts' ranks and how their outputs return.

    Between the stages travel the hidden rows and, beside them, each row's weights for the local experts,
    [rows, e], 0 where an expert does not take the row. The routing map itself never travels.

    Args:
        config: The layer's configuration.
        groups: Process groups as Megatron passes them, of which `ep` is the EDP group: attention's or the experts', they are the same ranks.
        router: The layer's router: it knows the layer's number and keeps the statistics.
    """

    config: Any
    kind: ClassVar[str]
    """The entry of `nemo_skymoe.dispatchers.DISPATCHERS` whose needs it has and for which the router is set up."""

    @classmethod
    def of(cls, config: Any) -> "type[EdpTokenDispatcher]":
        """The class for a configuration: this one, or one that the configuration allows to be faster."""
        return cls

    def __init__(self, config: Any, groups: Any, router: Any) -> None:
        super().__init__(config, groups)
        self.router = router
        self.ranks = ExpertGroup(self.ep_group, lambda: router.layer_number)
        self.topk: int = config.moe_router_topk
        self.num_experts: int = config.num_moe_experts
        self.num_local_experts = self.num_experts // self.ranks.size
        first = self.ranks.rank * self.num_local_experts
        self.local_experts = slice(first, first + self.num_local_experts)
        self.padded: bool = config.moe_pad_expert_input_to_capacity
        self._permutation: Permutation | None = None

    def dispatch_preprocess(
        self, tokens: Tensor, routing_map: Tensor, probs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """[S, B, H] to [t, H]; weights [t, E]."""
        self.hidden_shape = tokens.shape
        return tokens.reshape(-1, tokens.shape[-1]), probs

    def token_dispatch(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Nothing moves unless a subclass says so."""
        return hidden_states, probs

    def dispatch_postprocess(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows [R, H] and their weights [R, e] to what the experts take: [P, H], rows per expert, weights [P]."""
        self._permutation = self.permutation(probs)
        return (
            self._permutation.permute(hidden_states),
            self._permutation.tokens_per_expert,
            self._permutation.select(probs),
        )

    def permutation(self, weights_Re: Tensor) -> Permutation:
        """Which row goes to which local expert."""
        return by_expert(weights_Re)

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        """Outputs [P, H] of the local experts to their sum for each row, [R, H], in the model's dtype."""
        assert self._permutation is not None
        permutation, self._permutation = self._permutation, None
        return permutation.unpermute(hidden_states)

    def token_combine(self, hidden_states: Tensor) -> Tensor:
        """Nothing moves unless a subclass says so."""
        return hidden_states

    def combine_postprocess(self, hidden_states: Tensor) -> Tensor:
        """[t, H] to [S, B, H]."""
        return hidden_states.view(self.hidden_shape)

    def capacity(self, tokens: int) -> int:
        """Rows one expert takes of so many tokens."""
        return get_capacity(tokens * self.topk, self.num_experts, self.config.moe_expert_capacity_factor)

    def assignments(self, weights_tE: Tensor) -> tuple[Tensor, Tensor]:
        """The at most K weights of a token that are not 0, and their experts in the smallest integer type: [t, K]."""
        weights_tK, experts_tK = weights_tE.topk(self.topk, dim=1, sorted=False)
        return weights_tK, experts_tK.to(torch.uint8 if self.num_experts <= 256 else torch.int32)

    def spread(self, weights_TK: Tensor, experts_TK: Tensor) -> Tensor:
        """The inverse of `assignments`: [T, E]."""
        dense = weights_TK.new_zeros(weights_TK.shape[0], self.num_experts)
        return dense.scatter(1, experts_TK.long(), weights_TK)
