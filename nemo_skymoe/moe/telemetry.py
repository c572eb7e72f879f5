"""The statistics of routers: sums on the device, one reduction for all layers, and the metrics that follow from them.

Nothing here synchronises with the host in the forward pass. Shape suffixes: T tokens, E experts.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class LayerMetrics:
    """The metrics of one MoE layer in one optimizer step, over all micro-batches and all ranks that hold its tokens."""

    drop_rate: float
    """Dropped assignments / (k * tokens), without padding. In dropless training it is virtual: the rate that the
    nominal capacity factor would have caused. It is NaN if no token counted."""
    aux_loss: float
    """Auxiliary loss without its coefficient, as the mean over micro-batches, data-parallel ranks and kinds of loss."""
    load_max_over_mean: float
    """Assignments of the busiest expert / mean over the experts, before dropping."""
    gate_entropy: float
    """Mean entropy of a token's gate, in nats. This and the ratios are means over a sample, see `GATE_SAMPLE`."""
    max1_over_max2: float
    """Mean ratio of a token's largest to its second gate value (Figure 3); NaN with one expert."""
    max2_over_max3: float
    """Mean ratio of a token's second to its third gate value (Figure 3); NaN with fewer than three experts."""
    load: tuple[float, ...]
    """Share of the assignments that each expert got before dropping."""


METRICS = tuple(field.name for field in fields(LayerMetrics) if field.name != "load")
GATE_SAMPLE = 1024
"""Entropy and ratios are means over a sample of at most this many evenly spaced tokens of each micro-batch and rank."""
_TOP = 3  # Figure 3 compares the three largest gate values.
_SUMS = 2 + _TOP  # dropped, sampled tokens, entropy and the ratios; then the load


class RouterStatistics:
    """Running sums of one router since they were last taken.

    Every entry is a sum over tokens or micro-batches, so adding them up combines ranks and steps.
    """

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts
        self.reset()

    def reset(self) -> None:
        """Set all sums to zero."""
        self._micro_batches = 0.0
        self._observed: Tensor | None = None
        self._aux_loss: Tensor | None = None

    def observe(
        self,
        logits_TE: Tensor,
        scores_TE: Tensor,
        load_E: Tensor,
        capacity: int | Tensor | None,
        valid_T1: Tensor | None = None,
        num_sequences: int = 1,
    ) -> None:
        """Add one micro-batch.

        Args:
            logits_TE: Gating logits as the top-k saw them.
            scores_TE: The softmax of these logits.
            load_E: Assignments per expert before dropping.
            capacity: Number of assignments that an expert would take, for a virtual drop rate; None if
                `observe_dropped` is told how many were really dropped.
            valid_T1: False for padding, which does not count; None without padding.
            num_sequences: Number of sequences B of the micro-batch. Token t belongs to sequence t modulo B.
        """
        stride = _sample_stride(logits_TE.shape[0], num_sequences)
        valid_T1 = None if valid_T1 is None else valid_T1[::stride]
        shape = _shape_of_gate(logits_TE[::stride], scores_TE[::stride], valid_T1)
        load_E = load_E.double()
        dropped = load_E.new_zeros(1)
        if capacity is not None:
            # Under either drop policy, an expert keeps min(load, capacity) assignments.
            dropped = (load_E - capacity).clamp_min(0).sum(dim=0, keepdim=True)
        sums = torch.cat([dropped, shape, load_E])
        self._observed = sums if self._observed is None else self._observed + sums

    def observe_dropped(self, dropped: Tensor) -> None:
        """Add this rank's share of the dropped assignments to those that `observe` found beyond its capacity."""
        sums = dropped.new_zeros(_SUMS + self.num_experts, dtype=torch.float64)
        sums[0] = dropped
        self._observed = sums if self._observed is None else self._observed + sums

    def observe_aux_loss(self, share: Tensor, group_size: int) -> None:
        """Add this rank's share of a micro-batch's auxiliary loss, without the coefficient."""
        value = share.detach().double().reshape(())
        self._aux_loss = value if self._aux_loss is None else self._aux_loss + value
        self._micro_batches += 1.0 / group_size

    def take(self, device: torch.device) -> Tensor:
        """Return the [2 + 5 + E] float64 sums since the last call, and reset them."""
        observed = self._observed
        if observed is None:
            observed = torch.zeros(_SUMS + self.num_experts, dtype=torch.float64, device=device)
        micro_batches = observed.new_full((1,), self._micro_batches)
        aux_loss = observed.new_zeros(1) if self._aux_loss is None else self._aux_loss.reshape(1)
        self.reset()
        return torch.cat([micro_batches, aux_loss, observed])


def _sample_stride(num_tokens: int, num_sequences: int) -> int:
    """Return the step between sampled tokens. It has no divisor in common with B, so that every sequence is sampled."""
    stride = -(-num_tokens // GATE_SAMPLE) or 1
    while math.gcd(stride, num_sequences) > 1:
        stride += 1
    return stride


def _shape_of_gate(logits_TE: Tensor, scores_TE: Tensor, valid_T1: Tensor | None) -> Tensor:
    """Return [4] float64 sums over tokens: their number, entropies, and two ratios of their largest gate values."""
    values, index_T1 = _largest(logits_TE)
    # The entropy is log sum exp z - sum p z. The first term follows from the score of the largest z, and both are
    # taken relative to that z, which may be huge.
    mean_T1 = (scores_TE * (logits_TE - values[0])).sum(dim=1, keepdim=True)
    entropy_T1 = -scores_TE.gather(1, index_T1).log() - mean_T1
    # The ratios are in float64, because e^89 is already infinite in float32.
    largest_T3 = torch.cat([*values, *values[:1] * (_TOP - len(values))], dim=1).double()
    ratios_T2 = (largest_T3[:, :-1] - largest_T3[:, 1:]).exp()
    columns_T4 = torch.cat([torch.ones_like(entropy_T1), entropy_T1, ratios_T2], dim=1)
    if valid_T1 is not None:
        columns_T4 = columns_T4.masked_fill(~valid_T1, 0.0)
    return columns_T4.sum(dim=0)


def _largest(logits_TE: Tensor) -> tuple[list[Tensor], Tensor]:
    """Return the largest logits of each token, at most three [T, 1] columns, and the index [T, 1] of the largest.

    Repeated maxima take half the time of a `topk` on a CPU, and do not sort on a GPU.
    """
    value_T1, first_T1 = logits_TE.max(dim=1, keepdim=True)
    values, rest_TE, index_T1 = [value_T1], logits_TE.clone(), first_T1
    while len(values) < min(_TOP, logits_TE.shape[1]):
        rest_TE.scatter_(1, index_T1, -math.inf)
        value_T1, index_T1 = rest_TE.max(dim=1, keepdim=True)
        values.append(value_T1)
    return values, first_T1


def reduce_sums(
    statistics: Sequence[RouterStatistics], group: torch.distributed.ProcessGroup, device: torch.device
) -> Tensor:
    """Take the sums of all local layers and add them over `group` in one reduction: [layers, 2 + 5 + E] float64.

    The counts are integers held in float64, so every rank ends with the same bits. Sums of the same layers from
    several calls may be added up.
    """
    packed = torch.stack([entry.take(device) for entry in statistics])
    if group.size() > 1:
        torch.distributed.all_reduce(packed, group=group)
    return packed


def layer_metrics(sums: Tensor) -> list[LayerMetrics]:
    """Compute the metrics of each layer from the result of `reduce_sums`."""
    return [_metrics(row) for row in sums.tolist()]


def reduce_statistics(
    statistics: Sequence[RouterStatistics], group: torch.distributed.ProcessGroup, device: torch.device
) -> list[LayerMetrics]:
    """Take the sums of all local layers, add them over `group` in one reduction, and compute the metrics."""
    return layer_metrics(reduce_sums(statistics, group, device)) if statistics else []


def _metrics(row: list[float]) -> LayerMetrics:
    micro_batches, aux_loss, dropped, sampled, entropy, first, second, *load = row
    assignments, per_token = max(sum(load), 1.0), 1.0 / max(sampled, 1.0)
    return LayerMetrics(
        drop_rate=dropped / assignments if any(load) else math.nan,
        aux_loss=aux_loss / micro_batches if micro_batches else 0.0,
        load_max_over_mean=max(load) * len(load) / assignments,
        gate_entropy=entropy * per_token,
        max1_over_max2=first * per_token if len(load) > 1 else math.nan,
        max2_over_max3=second * per_token if len(load) > 2 else math.nan,
        load=tuple(value / assignments for value in load),
    )
