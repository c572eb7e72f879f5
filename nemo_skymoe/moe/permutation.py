"""Order tokens by expert and back, on any device. The host reads nothing but the number of rows per expert.

Shape suffixes: R rows (tokens of whatever ranks), E local experts, P permuted rows, H hidden.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from nemo_skymoe.moe.rows import FusedCopies, SortedCopies


@dataclass(frozen=True)
class Permutation:
    """Rows copied to the experts that take them, expert after expert.

    Attributes:
        rows_P: For each permuted row, the row that it copies.
        entries_P: For each permuted row, the place of its weight in the flattened, transposed [E, R] weights.
        tokens_per_expert: [E] int64 on the host, as Megatron's experts take them.
        num_rows: R.
        fused: Rows move by Transformer Engine's kernels (`moe_permute_fusion`) instead of by gathers.
    """

    rows_P: Tensor
    entries_P: Tensor
    tokens_per_expert: Tensor
    num_rows: int
    fused: bool = False

    @cached_property
    def _copies(self) -> SortedCopies | FusedCopies:
        if self.fused and self.rows_P.shape[0]:
            experts = self.tokens_per_expert.shape[0]
            entries = torch.zeros(experts * self.num_rows, dtype=torch.bool, device=self.rows_P.device)
            map_ER = entries.index_fill(0, self.entries_P, True).view(experts, -1)
            return FusedCopies(map_ER.t(), self.rows_P.shape[0])
        return SortedCopies(self.rows_P, self.num_rows)

    def permute(self, hidden_RH: Tensor) -> Tensor:
        """Copy the rows [R, H] to their experts, [P, H]."""
        return self._copies.copy(hidden_RH)

    def select(self, weights_RE: Tensor) -> Tensor:
        """Return the weight of each permuted row, [P]."""
        return weights_RE.t().reshape(-1).index_select(0, self.entries_P)

    def unpermute(self, outputs_PH: Tensor) -> Tensor:
        """Sum the outputs [P, H] of all experts of each row to [R, H], in the outputs' dtype."""
        return self._copies.sum(outputs_PH)


def by_expert(
    weights_RE: Tensor, tokens_per_expert: Tensor | None = None, fused: bool = False
) -> Permutation:
    """Send every row to the experts for which its weight is not 0.

    A weight of exactly 0 changes neither an output nor, through any score function, a gradient.

    Args:
        weights_RE: Weight of each expert for each row, 0 if the expert does not take the row.
        tokens_per_expert: Number of non-zero weights of each expert, on the host. If None, the host reads it.
        fused: Use Transformer Engine's kernels.
    """
    assigned_RE = weights_RE.detach() != 0
    if tokens_per_expert is None:
        tokens_per_expert = assigned_RE.sum(dim=0).cpu()
    entries = true_positions(assigned_RE.t().reshape(-1), int(tokens_per_expert.sum()))
    num_rows = weights_RE.shape[0]
    return Permutation(entries % max(num_rows, 1), entries, tokens_per_expert, num_rows, fused)


def by_capacity(weights_RE: Tensor, capacity: int, segments: int = 1, fused: bool = False) -> Permutation:
    """Give every expert exactly `capacity` rows of each segment: first those with a weight, then any others.

    All shapes are known beforehand, so the host reads nothing. No expert may have more than `capacity` weights in a
    segment.

    Args:
        weights_RE: Weight of each expert for each row, 0 if the expert does not take the row.
        capacity: Number of rows that an expert takes of one segment.
        segments: Number of equal pieces of the rows, one per rank. The capacity holds for each of them.
        fused: Use Transformer Engine's kernels.
    """
    num_rows, num_experts = weights_RE.shape
    segment = num_rows // segments
    weights_SRE = weights_RE.detach().view(segments, segment, num_experts)
    # In the order of the rows, in which the kernels take them too.
    rows_SCE = weights_SRE.topk(capacity, dim=1, sorted=False).indices.sort(dim=1).values
    starts_S = torch.arange(0, num_rows, segment, device=weights_RE.device)
    rows_EP = (rows_SCE + starts_S.view(-1, 1, 1)).permute(2, 0, 1).reshape(num_experts, -1)
    offsets_E = torch.arange(0, num_rows * num_experts, num_rows, device=weights_RE.device)
    entries_EP = rows_EP + offsets_E.view(-1, 1)
    tokens = torch.full((num_experts,), segments * capacity, dtype=torch.int64, device="cpu")
    return Permutation(rows_EP.reshape(-1), entries_EP.reshape(-1), tokens, num_rows, fused)


def true_positions(mask: Tensor, count: int) -> Tensor:
    """Return the ascending positions of the `count` true entries of a flat mask.

    `Tensor.nonzero` would make the host wait for the number of entries.
    """
    places = torch.where(mask, mask.cumsum(0) - 1, count)
    positions = torch.arange(mask.shape[0], device=mask.device)
    return positions.new_empty(count + 1).scatter_(0, places, positions)[:count]
