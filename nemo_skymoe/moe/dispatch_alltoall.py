"""EDP with sequence parallelism by all-to-all, which sends a token once to each rank that has an expert for it."""

from typing import Any

import torch
from torch import Tensor

from nemo_skymoe.moe.collectives import all_to_all
from nemo_skymoe.moe.dispatcher import EdpTokenDispatcher
from nemo_skymoe.moe.permutation import Permutation, by_capacity, by_expert


class AllToAllTokenDispatcher(EdpTokenDispatcher):
    """Sends a token at most once to each rank, which sums its experts' outputs and sends back one row.

    Megatron's all-to-all sends a row for every assignment. If two picked experts are on the same rank, this class saves
    one row each way. The host reads from the device once per layer: the number of rows to and from each rank, and the
    number of rows per expert.
    """

    kind = "alltoall"

    @classmethod
    def of(cls, config: Any) -> type[EdpTokenDispatcher]:
        """Return a class that counts no rows if experts are padded to their capacity, because all pieces are equal."""
        return PaddedAllToAllTokenDispatcher if config.moe_pad_expert_input_to_capacity else cls

    def dispatch_preprocess(
        self, tokens: Tensor, routing_map: Tensor, probs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Turn tokens [S, B, H] into the rows to send [R, H], rank after rank, and their weights there [R, e]."""
        hidden_tH, weights_tE = super().dispatch_preprocess(tokens, routing_map, probs)
        weights_nte = weights_tE.view(-1, self.ranks.size, self.num_local_experts).transpose(0, 1)
        sent_nt = (weights_nte.detach() != 0).any(dim=-1)
        self._exchange_counts(weights_nte, sent_nt)
        # Ranks take rows as experts do.
        self._to_ranks = by_expert(sent_nt.t(), torch.tensor(self._sent, device="cpu"), self.fused)
        weights_Re = weights_nte.reshape(-1, self.num_local_experts).index_select(0, self._to_ranks.entries_P)
        return self._to_ranks.permute(hidden_tH), weights_Re

    @torch.no_grad()
    def _exchange_counts(self, weights_nte: Tensor, sent_nt: Tensor) -> None:
        """Tell each rank how many rows it gets in all and for each expert, and read all counts at once."""
        counts = [sent_nt.sum(dim=1, keepdim=True), (weights_nte != 0).sum(dim=1)]
        counts_n1e = torch.cat(counts, dim=1).int()
        table = torch.cat([counts_n1e[:, :1], self.ranks.all_to_all(counts_n1e)], dim=1).cpu()
        self._sent: list[int] = table[:, 0].tolist()
        self._received: list[int] = table[:, 1].tolist()
        self._tokens_per_expert = table[:, 2:].sum(dim=0)

    def token_dispatch(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Send rows and weights to their ranks."""
        return (
            all_to_all(hidden_states, self.ranks, self._received, self._sent),
            all_to_all(probs, self.ranks, self._received, self._sent),
        )

    def permutation(self, weights_Re: Tensor) -> Permutation:
        """Assign the received rows to local experts."""
        return by_expert(weights_Re, self._tokens_per_expert, self.fused)

    def token_combine(self, hidden_states: Tensor) -> Tensor:
        """Send one row back for each row received."""
        return all_to_all(hidden_states, self.ranks, self._sent, self._received)

    def combine_postprocess(self, hidden_states: Tensor) -> Tensor:
        """Sum the rows [R, H] that came back for each token to [S, B, H]."""
        return self._to_ranks.unpermute(hidden_states).view(self.hidden_shape)


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

    def token_dispatch(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Send rows and weights to their ranks."""
        return all_to_all(hidden_states, self.ranks), all_to_all(probs, self.ranks)

    def dispatch_postprocess(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Reorder the rows: they come rank after rank, and the experts take them expert after expert."""
        shape = (self.ranks.size, self.num_local_experts)
        rows = torch.full(shape[1:], self.ranks.size * self._places, dtype=torch.int64, device="cpu")
        return self._regroup(hidden_states, *shape), rows, self._regroup(probs, *shape)

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        """Undo the reordering of `dispatch_postprocess`."""
        return self._regroup(hidden_states, self.num_local_experts, self.ranks.size)

    def token_combine(self, hidden_states: Tensor) -> Tensor:
        """Send one row back for each row received."""
        return all_to_all(hidden_states, self.ranks)

    def combine_postprocess(self, hidden_states: Tensor) -> Tensor:
        """Sum the rows of each token, from [E * capacity, H] to [S, B, H]."""
        return super().combine_postprocess(super().combine_preprocess(hidden_states))

    def _regroup(self, rows: Tensor, outer: int, inner: int) -> Tensor:
        return rows.view(outer, inner, self._places, *rows.shape[1:]).transpose(0, 1).flatten(0, 2)
