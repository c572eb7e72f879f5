"""What a router observes: sums on the device, reduced once for all layers, and the metrics made of them.

Nothing here synchronises with the host in the forward pass. Shape suffixes: T tokens, E experts.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class LayerMetrics:
    """One MoE layer over one optimizer step: all micro-batches, all ranks that hold its tokens."""

    drop_rate: float
    """Dropped assignments / (k * tokens); virtual, at the nominal capacity factor, in dropless training; padding
    counts in neither. NaN where no token counted."""
    aux_loss: float
    """Auxiliary loss without its coefficient, mean over micro-batches, data-parallel ranks and kinds of loss."""
    load_max_over_mean: float
    """Assignments of the busiest expert / mean over the experts, before dropping."""
    gate_entropy: float
    """Mean entropy of a token's gate, nats; this and the ratios over a sample, see `GATE_SAMPLE`."""
    max1_over_max2: float
    """Mean ratio of a token's largest to its second gate value (Figure 3); NaN with one expert."""
    max2_over_max3: float
    """Mean ratio of a token's second to its third gate value (Figure 3); NaN with fewer than three experts."""
    load: tuple[float, ...]
    """Share of the assignments each expert got before dropping."""


METRICS = tuple(field.name for field in fields(LayerMetrics) if field.name != "load")
GATE_SAMPLE = 1024
"""Entropy and ratios are means over at most so many tokens, evenly spaced, of each micro-batch and rank."""
_TOP = 3  # Figure 3 compares the three largest gate values.
_SUMS = 2 + _TOP  # dropped, sampled tokens, entropy and the ratios; then the load


class RouterStatistics:
    """Running sums of one router since they were last taken.

    Every entry is a sum over tokens or micro-batches, so ranks and steps combine by addition alone.
    """

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
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
            scores_TE: Their softmax.
            load_E: Assignments per expert before dropping.
            capacity: Assignments an expert would take, for a virtual drop rate; None where `observe_dropped` is
                told what was really dropped.
            valid_T1: False for padding, which counts nowhere; None without padding.
            num_sequences: Sequences B of the micro-batch: token t is of sequence t modulo B.
        """
        stride = _sample_stride(logits_TE.shape[0], num_sequences)
        valid_T1 = None if valid_T1 is None else valid_T1[::stride]
        shape = _shape_of_gate(logits_TE[::stride], scores_TE[::stride], valid_T1)
        load_E = load_E.double()
        dropped = load_E.new_zeros(1)
        if capacity is not None:
            # Kept per expert is min(load, capacity) under either drop policy.
            dropped = (load_E - capacity).clamp_min(0).sum(dim=0, keepdim=True)
        sums = torch.cat([dropped, shape, load_E])
        self._observed = sums if self._observed is None else self._observed + sums

    def observe_dropped(self, dropped: Tensor) -> None:
        """Add assignments that were dropped: this rank's share of them, beside those beyond `observe`'s capacity."""
        sums = dropped.new_zeros(_SUMS + self.num_experts, dtype=torch.float64)
        sums[0] = dropped
        self._observed = sums if self._observed is None else self._observed + sums

    def observe_aux_loss(self, share: Tensor, group_size: int) -> None:
        """Add a micro-batch's auxiliary loss: this rank's share of it, coefficient removed."""
        value = share.detach().double().reshape(())
        self._aux_loss = value if self._aux_loss is None else self._aux_loss + value
        self._micro_batches += 1.0 / group_size

    def take(self, device: torch.device) -> Tensor:
        """[2 + 5 + E] float64 sums since the last call, which are then forgotten."""
        observed = self._observed
        if observed is None:
            observed = torch.zeros(_SUMS + self.num_experts, dtype=torch.float64, device=device)
        micro_batches = observed.new_full((1,), self._micro_batches)
        aux_loss = observed.new_zeros(1) if self._aux_loss is None else self._aux_loss.reshape(1)
        self.reset()
        return torch.cat([micro_batches, aux_loss, observed])


def _sample_stride(num_tokens: int, num_sequences: int) -> int:
    """Steps between sampled tokens, without a divisor in common with B: a multiple of B would see one sequence alone."""
    stride = -(-num_tokens // GATE_SAMPLE) or 1
    while math.gcd(stride, num_sequences) > 1:
        stride += 1
    return stride


def _shape_of_gate(logits_TE: Tensor, scores_TE: Tensor, valid_T1: Tensor | None) -> Tensor:
    """[4] sums over tokens, float64: their number, entropies, and the two ratios of the largest gate values."""
    values, index_T1 = _largest(logits_TE)
    # Entropy: log sum exp z - sum p z, the former from one score; relative to the largest z, which may be huge.
    mean_T1 = (scores_TE * (logits_TE - values[0])).sum(dim=1, keepdim=True)
    entropy_T1 = -scores_TE.gather(1, index_T1).log() - mean_T1
    # In float64, where e^88 is a number.
    largest_T3 = torch.cat([*values, *values[:1] * (_TOP - len(values))], dim=1).double()
    ratios_T2 = (largest_T3[:, :-1] - largest_T3[:, 1:]).exp()
    columns_T4 = torch.cat([torch.ones_like(entropy_T1), entropy_T1, ratios_T2], dim=1)
    if valid_T1 is not None:
        columns_T4 = columns_T4.masked_fill(~valid_T1, 0.0)
    return columns_T4.sum(dim=0)


def _largest(logits_TE: Tensor) -> tuple[list[Tensor], Tensor]:
    """The up to three largest logits of each token as [T, 1] columns, and the index [T, 1] of the largest.

    Repeated maxima take half of a `topk`'s time on a CPU and none of its sorts on a GPU.
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

    The counts are integers held in float64, so every rank ends with the same bits. Further sums of the same layers
    combine by addition.
    """
    packed = torch.stack([entry.take(device) for entry in statistics])
    if group.size() > 1:
        torch.distributed.all_reduce(packed, group=group)
    return packed


def layer_metrics(sums: Tensor) -> list[LayerMetrics]:
    """The metrics of each layer, from the result of `reduce_sums`."""
    return [_metrics(row) for row in sums.tolist()]


def reduce_statistics(
    statistics: Sequence[RouterStatistics], group: torch.distributed.ProcessGroup, device: torch.device
) -> list[LayerMetrics]:
    """Take the sums of all local layers, add them over `group` in one reduction, and make metrics of them."""
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
