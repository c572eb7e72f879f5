"""The base class of the EDP token dispatchers: it orders rows by expert, and brings weights into a form worth sending.

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
    """Base class with the methods of Megatron's dispatchers. A subclass moves rows to the experts' ranks and back.

    Each method hands hidden rows to the next and, beside them, each row's weights for the local experts, [rows, e].
    A weight is 0 if the expert does not take the row. The routing map itself never travels.

    Args:
        config: The layer's configuration.
        groups: Process groups as Megatron passes them. Their `ep` is the EDP group: the group of attention or that of
            the experts, which have the same ranks.
        router: The layer's router. It knows the layer's number and keeps the statistics.
    """

    config: Any
    kind: ClassVar[str]
    """Name of the entry of `nemo_skymoe.dispatchers.DISPATCHERS` that says what the class needs of a configuration."""

    @classmethod
    def of(cls, config: Any) -> "type[EdpTokenDispatcher]":
        """Return the class for a configuration: this one, or a faster one that the configuration allows."""
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
        self.fused: bool = config.moe_permute_fusion
        self._permutation: Permutation | None = None

    def dispatch_preprocess(
        self, tokens: Tensor, routing_map: Tensor, probs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the tokens [S, B, H] as [t, H], and their weights [t, E]."""
        self.hidden_shape = tokens.shape
        return tokens.reshape(-1, tokens.shape[-1]), probs

    def token_dispatch(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Send rows to the experts' ranks. The base class sends nothing."""
        return hidden_states, probs

    def dispatch_postprocess(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Order rows [R, H] by expert. Returns what the experts take: rows [P, H], rows per expert, weights [P]."""
        self._permutation = self.permutation(probs)
        return (
            self._permutation.permute(hidden_states),
            self._permutation.tokens_per_expert,
            self._permutation.select(probs),
        )

    def permutation(self, weights_Re: Tensor) -> Permutation:
        """Assign rows to local experts by their weights [R, e]."""
        return by_expert(weights_Re, fused=self.fused)

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        """Sum the outputs [P, H] of the local experts for each row, [R, H], in the model's dtype."""
        assert self._permutation is not None
        permutation, self._permutation = self._permutation, None
        return permutation.unpermute(hidden_states)

    def token_combine(self, hidden_states: Tensor) -> Tensor:
        """Send rows back to the ranks of their tokens. The base class sends nothing."""
        return hidden_states

    def combine_postprocess(self, hidden_states: Tensor) -> Tensor:
        """Return the rows [t, H] as the layer's output [S, B, H]."""
        return hidden_states.view(self.hidden_shape)

    def capacity(self, tokens: int) -> int:
        """Return the number of rows that one expert takes of `tokens` tokens."""
        return get_capacity(tokens * self.topk, self.num_experts, self.config.moe_expert_capacity_factor)

    def assignments(self, weights_tE: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weights [t, K] of each token that are not 0, at most K, and their experts as small integers."""
        weights_tK, experts_tK = weights_tE.topk(self.topk, dim=1, sorted=False)
        return weights_tK, experts_tK.to(torch.uint8 if self.num_experts <= 256 else torch.int32)

    def spread(self, weights_TK: Tensor, experts_TK: Tensor) -> Tensor:
        """Undo `assignments`: return weights [T, E]."""
        dense = weights_TK.new_zeros(weights_TK.shape[0], self.num_experts)
        return dense.scatter(1, experts_TK.long(), weights_TK)
