"""EDP with sequence parallelism by all-to-all, which sends a token once to each rank that has an expert for it."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nemo_skymoe.moe.collectives import Exchange, begin_all_to_all
from nemo_skymoe.moe.dispatch_padded import PaddedAllToAllTokenDispatcher
from nemo_skymoe.moe.dispatcher import EdpTokenDispatcher, Half, halves
from nemo_skymoe.moe.permutation import Permutation, by_expert


class AllToAllTokenDispatcher(EdpTokenDispatcher):
    """Sends a token at most once to each rank, which sums its experts' outputs and sends back one row.

    Megatron's all-to-all sends a row for every assignment. If two picked experts are on the same rank, this class saves
    one row each way. The host reads from the device once per layer: the number of rows to and from each rank, and the
    number of rows per expert.
    """

    kind = "alltoall"
    _sent: list[int]
    _received: list[int]
    _to_ranks: Permutation

    @classmethod
    def of(cls, config: Any) -> type[EdpTokenDispatcher]:
        """Return a class that counts no rows if experts are padded to their capacity, because all pieces are equal."""
        return PaddedAllToAllTokenDispatcher if config.moe_pad_expert_input_to_capacity else cls

    def dispatch_preprocess(
        self, tokens: Tensor, routing_map: Tensor, probs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Turn tokens [S, B, H] into the rows to send [R, H], rank after rank, and their weights there [R, e]."""
        hidden_tH, weights_tE = super().dispatch_preprocess(tokens, routing_map, probs)
        return self._prepare([self], [hidden_tH], [weights_tE])[0]

    def split(self, tokens: Tensor, routing_map: Tensor, probs: Tensor) -> list[Half]:
        """Split the tokens in two, and do for each half what `dispatch_preprocess` does for all."""
        hidden_tH, weights_tE = super().dispatch_preprocess(tokens, routing_map, probs)
        parts, hidden = [copy.copy(self), copy.copy(self)], halves(hidden_tH)
        for part, half_tH in zip(parts, hidden, strict=True):
            part.hidden_shape = half_tH.shape
        prepared = self._prepare(parts, hidden, halves(weights_tE))
        return [Half(part, *rows) for part, rows in zip(parts, prepared, strict=True)]

    def _prepare(
        self, parts: Sequence["AllToAllTokenDispatcher"], hidden: Sequence[Tensor], weights: Sequence[Tensor]
    ) -> list[tuple[Tensor, Tensor]]:
        by_rank = [part.view(len(part), self.ranks.size, self.num_local_experts) for part in weights]
        self._exchange_counts(parts, by_rank)
        prepared = []
        for part, hidden_tH, weights_tne in zip(parts, hidden, by_rank, strict=True):
            # Ranks take rows as experts do.
            takes_tn = (weights_tne.detach() != 0).any(dim=-1)
            part._to_ranks = by_expert(takes_tn, torch.tensor(part._sent, device="cpu"), self.fused)
            weights_Re = weights_tne.transpose(0, 1).reshape(-1, self.num_local_experts)
            weights_Re = weights_Re.index_select(0, part._to_ranks.entries_P)
            prepared.append((part._to_ranks.permute(hidden_tH), weights_Re))
        return prepared

    def _exchange_counts(self, parts: Sequence["AllToAllTokenDispatcher"], weights: Sequence[Tensor]) -> None:
        """Tell each rank how many rows it gets of each part, in all and for each expert, and read all counts at once."""
        counts_npX = torch.stack([_counts(weights_tne) for weights_tne in weights], dim=1)
        table_npX = self.read(counts_npX, lambda: self._ask(counts_npX))
        for part, table_nX in zip(parts, table_npX.unbind(1), strict=True):
            part._sent = table_nX[:, 0].tolist()
            part._received = table_nX[:, 1].tolist()
            part.tokens_per_expert = table_nX[:, 2:].sum(dim=0)

    def count(self, parts: Sequence[EdpTokenDispatcher], weights: Sequence[Tensor]) -> None:
        """Count nothing: each rank was told with the number of its rows."""

    def _ask(self, counts_npX: Tensor) -> Tensor:
        """Return the rows sent to each rank, those that it sends, and these for each local expert, on the host."""
        return self.ranks.read(torch.cat([counts_npX[..., :1], self.ranks.all_to_all(counts_npX)], dim=-1))

    def begin_dispatch(self, hidden_states: Tensor, probs: Tensor) -> tuple[Exchange, Exchange]:
        """Begin to send rows and weights to their ranks."""
        return (
            begin_all_to_all(hidden_states, self.ranks, self._received, self._sent),
            begin_all_to_all(probs, self.ranks, self._received, self._sent),
        )

    def begin_combine(self, hidden_states: Tensor) -> Exchange:
        """Begin to send one row back for each row received."""
        return begin_all_to_all(hidden_states, self.ranks, self._sent, self._received)

    def combine_postprocess(self, hidden_states: Tensor) -> Tensor:
        """Sum the rows [R, H] that came back for each token to [S, B, H]."""
        return self._to_ranks.unpermute(hidden_states).view(self.hidden_shape)


def _counts(weights_tne: Tensor) -> Tensor:
    """Count the rows that each rank takes, in all and for each of its experts, [n, 1 + e]."""
    takes_tne = weights_tne != 0
    return torch.cat([takes_tne.any(dim=-1).sum(dim=0).unsqueeze(-1), takes_tne.sum(dim=0)], dim=1).int()
