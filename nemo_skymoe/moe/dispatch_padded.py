"""EDP by all-to-all with experts padded to their capacity: every piece has the same size, and nothing is counted."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from nemo_skymoe.moe.collectives import Exchange, begin_all_to_all
from nemo_skymoe.moe.dispatcher import EdpTokenDispatcher, Half, halves
from nemo_skymoe.moe.permutation import by_capacity


class PaddedAllToAllTokenDispatcher(EdpTokenDispatcher):
    """All-to-all of equal pieces for `moe_pad_expert_input_to_capacity`, without counts and without reads by the host.

    A row is a place of an expert, as in Megatron's own class. The places travel whether they are full or empty, so
    sending a token once for two experts of a rank would save no byte.
    """

    kind = "alltoall"

    def dispatch_preprocess(
        self, tokens: Tensor, routing_map: Tensor, probs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Turn tokens [S, B, H] into the rows to send [E * capacity, H], expert after expert, and their weights."""
        hidden_tH, weights_tE = super().dispatch_preprocess(tokens, routing_map, probs)
        self._places = self.capacity(hidden_tH.shape[0])
        self._permutation = by_capacity(weights_tE, self._places, fused=self.fused)
        return self._permutation.permute(hidden_tH), self._permutation.select(weights_tE)

    def split(self, tokens: Tensor, routing_map: Tensor, probs: Tensor) -> list[Half]:
        """Split the places of every expert in two. Halves of the tokens would need all places each."""
        rows, weights = self.dispatch_preprocess(tokens, routing_map, probs)
        by_place = rows.view(self.num_experts, self._places, -1), weights.view(self.num_experts, self._places)
        found = []
        for rows_ECH, weights_EC in zip(*(halves(part, dim=1) for part in by_place), strict=True):
            part = copy.copy(self)
            part._places = rows_ECH.shape[1]
            found.append(Half(part, rows_ECH.flatten(0, 1), weights_EC.flatten()))
        return found

    def join(self, parts: Sequence[EdpTokenDispatcher], rows: Sequence[Tensor]) -> Tensor:
        """Put the places [E * C, H] of both halves together, and sum the rows of each token to [S, B, H]."""
        rows_ECH = torch.cat([back.view(self.num_experts, -1, back.shape[-1]) for back in rows], dim=1)
        return self.combine_postprocess(rows_ECH.flatten(0, 1))

    def count(self, parts: Sequence[EdpTokenDispatcher], weights: Sequence[Tensor]) -> None:
        """Count nothing: every expert has the same number of places."""

    def begin_dispatch(self, hidden_states: Tensor, probs: Tensor) -> tuple[Exchange, Exchange]:
        """Begin to send rows and weights to their ranks."""
        return begin_all_to_all(hidden_states, self.ranks), begin_all_to_all(probs, self.ranks)

    def dispatch_postprocess(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Reorder the rows: they come rank after rank, and the experts take them expert after expert."""
        shape = (self.ranks.size, self.num_local_experts)
        rows = torch.full(shape[1:], self.ranks.size * self._places, dtype=torch.int64, device="cpu")
        return self._regroup(hidden_states, *shape), rows, self._regroup(probs, *shape)

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        """Undo the reordering of `dispatch_postprocess`."""
        return self._regroup(hidden_states, self.num_local_experts, self.ranks.size)

    def begin_combine(self, hidden_states: Tensor) -> Exchange:
        """Begin to send one row back for each row received."""
        return begin_all_to_all(hidden_states, self.ranks)

    def combine_postprocess(self, hidden_states: Tensor) -> Tensor:
        """Sum the rows of each token, from [E * capacity, H] to [S, B, H]."""
        return super().combine_postprocess(super().combine_preprocess(hidden_states))

    def _regroup(self, rows: Tensor, outer: int, inner: int) -> Tensor:
        return rows.view(outer, inner, self._places, *rows.shape[1:]).transpose(0, 1).flatten(0, 2)
