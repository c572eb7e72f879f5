"""The base class of the EDP token dispatchers: it orders rows by expert, and brings weights into a form worth sending.

A micro-batch is exchanged in one piece, or in two, see `overlap`.

Shape suffixes: t tokens of this rank, T tokens of the group, K picked experts, E experts, e local experts,
H hidden.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from megatron.core.transformer.moe.moe_utils import get_capacity
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher
from torch import Tensor

from nemo_skymoe.moe.collectives import Exchange, hold
from nemo_skymoe.moe.expert_group import ExpertGroup
from nemo_skymoe.moe.permutation import Permutation, by_expert


@dataclass(frozen=True)
class Half:
    """One half of a micro-batch on its way: its rows and weights as `dispatch_preprocess` returns them.

    Attributes:
        dispatcher: A copy of the micro-batch's dispatcher, which keeps what belongs to this half.
        rows: Hidden rows.
        weights: Their weights.
    """

    dispatcher: "EdpTokenDispatcher"
    rows: Tensor
    weights: Tensor


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
        self.reads = router.kept_reads
        self.tokens_per_expert: Tensor | None = None
        """Rows that each local expert takes, [e] on the host, once they are counted."""
        self._permutation: Permutation | None = None

    def dispatch_preprocess(
        self, tokens: Tensor, routing_map: Tensor, probs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the tokens [S, B, H] as [t, H], and their weights [t, E]."""
        self.hidden_shape = tokens.shape
        return tokens.reshape(-1, tokens.shape[-1]), probs

    def begin_dispatch(self, hidden_states: Tensor, probs: Tensor) -> tuple[Exchange, Exchange]:
        """Begin to send rows to the experts' ranks, and their weights. The base class sends nothing."""
        return hold(hidden_states), hold(probs)

    def token_dispatch(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Send rows to the experts' ranks, and their weights."""
        rows, weights = self.begin_dispatch(hidden_states, probs)
        return rows.end(), weights.end()

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
        if self.tokens_per_expert is None:
            self.count([self], [weights_Re])
        tokens, self.tokens_per_expert = self.tokens_per_expert, None
        return by_expert(weights_Re, tokens, self.fused)

    def count(self, parts: Sequence["EdpTokenDispatcher"], weights: Sequence[Tensor]) -> None:
        """Let the host read at once how many rows each local expert takes of each part, by the rows' weights [R, e]."""
        counts = torch.stack([(weights_Re.detach() != 0).sum(dim=0) for weights_Re in weights])
        found = self.read(counts, lambda: self.ranks.read(counts))
        for part, tokens_per_expert in zip(parts, found, strict=True):
            part.tokens_per_expert = tokens_per_expert

    def read(self, counts: Tensor, read: Callable[[], Tensor]) -> Tensor:
        """Return what `read` reads from the device, or has read in the first pass of recomputation."""
        return self.reads.read(counts, read, training=self.router.training, where=str(self.ranks))

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        """Sum the outputs [P, H] of the local experts for each row, [R, H], in the model's dtype."""
        assert self._permutation is not None
        permutation, self._permutation = self._permutation, None
        return permutation.unpermute(hidden_states)

    def begin_combine(self, hidden_states: Tensor) -> Exchange:
        """Begin to send rows back to the ranks of their tokens. The base class sends nothing."""
        return hold(hidden_states)

    def token_combine(self, hidden_states: Tensor) -> Tensor:
        """Send rows back to the ranks of their tokens."""
        return self.begin_combine(hidden_states).end()

    def combine_postprocess(self, hidden_states: Tensor) -> Tensor:
        """Return the rows [t, H] as the layer's output [S, B, H]."""
        return hidden_states.view(self.hidden_shape)

    def split(self, tokens: Tensor, routing_map: Tensor, probs: Tensor) -> list[Half]:
        """Do what `dispatch_preprocess` does, and split the result in two by tokens, of which the first has no fewer."""
        hidden, weights = self.dispatch_preprocess(tokens, routing_map, probs)
        found = []
        for rows, weights_of_rows in zip(halves(hidden), self.split_weights(weights), strict=True):
            part = copy.copy(self)
            part.hidden_shape = rows.shape
            found.append(Half(part, rows, weights_of_rows))
        return found

    def split_weights(self, weights: Tensor) -> Sequence[Tensor]:
        """Split the weights that `dispatch_preprocess` returns as its rows are split."""
        return halves(weights)

    def join(self, parts: Sequence["EdpTokenDispatcher"], rows: Sequence[Tensor]) -> Tensor:
        """Undo `split`: return the layer's output [S, B, H] of the rows that came back to each part."""
        tokens = [part.combine_postprocess(back) for part, back in zip(parts, rows, strict=True)]
        return torch.cat(tokens).view(self.hidden_shape)

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


def halves(rows: Tensor, dim: int = 0) -> tuple[Tensor, Tensor]:
    """Split a tensor in two, the larger half first."""
    second = rows.shape[dim] // 2
    first, second = rows.split([rows.shape[dim] - second, second], dim=dim)
    return first, second
