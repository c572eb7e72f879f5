"""The statistics of routers: sums on the device, one reduction for all layers, and the metrics that follow from them.

Nothing here synchronises with the host in the forward pass. Shape suffixes: T tokens, E experts.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple, cast

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
_MOST_WAITING = 64


class GateShape(NamedTuple):
    """What the metrics of the gate's shape need of every sampled token."""

    entropy_T: Tensor
    largest_TK: Tensor
    """The largest logits in descending order, three of them or as many as there are experts."""
    valid_T1: Tensor | None
    """False for padding, which does not count; None without padding."""


class RouterStatistics:
    """Running sums of one router since they were last taken.

    Every entry is a sum over tokens or micro-batches, so adding them up combines ranks and steps. What a micro-batch
    adds waits in lists until the sums are taken, because adding it up at once would take many small kernels.

    Attributes:
        micro_batches: Number of micro-batches observed.
    """

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts
        self._loads: list[Tensor] = []
        self._excesses: list[Tensor] = []
        self._dropped: list[Tensor] = []
        self._shapes: list[GateShape] = []
        self._losses: dict[float, list[Tensor]] = {}
        self.reset()

    def reset(self) -> None:
        """Set all sums to zero."""
        self._sums: Tensor | None = None
        self._losses_counted = 0.0
        self.micro_batches = 0
        self._forget_waiting()

    def _forget_waiting(self) -> None:
        for waiting in (self._loads, self._excesses, self._dropped, self._shapes, self._losses):
            waiting.clear()

    def observe(self, load_E: Tensor, capacity: int | Tensor | None, shape: GateShape | None) -> None:
        """Add one micro-batch.

        Args:
            load_E: Assignments per expert before dropping.
            capacity: Number of assignments that an expert would take, for a virtual drop rate; None if
                `observe_dropped` is told how many were really dropped.
            shape: The result of `gate_shape`, or None to leave this micro-batch out of the metrics of the gate's shape.
        """
        self.micro_batches += 1
        if len(self._loads) == _MOST_WAITING:
            self._add_up(load_E.device)
        self._loads.append(load_E)
        if capacity is not None:
            self._excesses.append(load_E.double() - capacity)
        if shape is not None:
            self._shapes.append(shape)

    def observe_dropped(self, dropped: Tensor) -> None:
        """Add this rank's share of the dropped assignments to those that `observe` found beyond its capacity."""
        if len(self._dropped) == _MOST_WAITING:
            self._add_up(dropped.device)
        self._dropped.append(dropped)

    def observe_aux_loss(self, share: Tensor, coefficient: float, group_size: int) -> None:
        """Add this rank's share of a micro-batch's auxiliary loss, which contains the coefficient."""
        if sum(map(len, self._losses.values())) == _MOST_WAITING:
            self._add_up(share.device)
        self._losses.setdefault(coefficient, []).append(share.detach().reshape(()))
        self._losses_counted += 1.0 / group_size

    def take(self, device: torch.device) -> Tensor:
        """Return the [2 + 5 + E] float64 sums since the last call, and reset them."""
        self._add_up(device)
        sums = cast(Tensor, self._sums)
        counted = sums.new_full((1,), self._losses_counted)
        self.reset()
        return torch.cat([counted, sums])

    @torch.no_grad()
    def _add_up(self, device: torch.device) -> None:
        """Add what waits to the [1 + 5 + E] sums."""
        device = self._loads[0].device if self._loads else device
        zero = torch.zeros(1, dtype=torch.float64, device=device)
        parts = [zero, zero, zero.expand(1 + _TOP), zero.expand(self.num_experts)]
        for coefficient, losses in self._losses.items():
            parts[0] = parts[0] + (torch.stack(losses) / coefficient).sum(dtype=torch.float64)
        if self._dropped:
            parts[1] = parts[1] + torch.stack(self._dropped).sum(dtype=torch.float64)
        if self._excesses:
            # Under either drop policy, an expert keeps min(load, capacity) assignments.
            parts[1] = parts[1] + torch.stack(self._excesses).clamp_min(0).sum()
        if self._shapes:
            parts[2] = _sums_of_shapes(self._shapes)
        if self._loads:
            parts[3] = torch.stack(self._loads).sum(dim=0, dtype=torch.float64)
        sums = torch.cat(parts)
        self._sums = sums if self._sums is None else self._sums + sums
        self._forget_waiting()


def gate_shape(
    logits_TE: Tensor, scores_TE: Tensor, valid_T1: Tensor | None = None, num_sequences: int = 1
) -> GateShape:
    """Return the shape of the gate of a sample of evenly spaced tokens.

    Args:
        logits_TE: Gating logits as the top-k saw them.
        scores_TE: The softmax of these logits.
        valid_T1: False for padding, which does not count; None without padding.
        num_sequences: Number of sequences B of the micro-batch. Token t belongs to sequence t modulo B.
    """
    stride = sample_stride(logits_TE.shape[0], num_sequences)
    largest_TK = logits_TE[::stride].topk(min(_TOP, logits_TE.shape[1])).values
    entropy_T = torch.special.entr(scores_TE[::stride]).sum(dim=1)
    return GateShape(entropy_T, largest_TK, None if valid_T1 is None else valid_T1[::stride])


def sample_stride(num_tokens: int, num_sequences: int) -> int:
    """Return the step between sampled tokens. It has no divisor in common with B, so that every sequence is sampled."""
    stride = -(-num_tokens // GATE_SAMPLE) or 1
    while math.gcd(stride, num_sequences) > 1:
        stride += 1
    return stride


def _sums_of_shapes(shapes: Sequence[GateShape]) -> Tensor:
    """Return [4] float64 sums over tokens: their number, entropies, and two ratios of their largest gate values."""
    entropy_T1 = torch.cat([shape.entropy_T for shape in shapes]).double().unsqueeze(1)
    # The ratios are in float64, because e^89 is already infinite in float32.
    largest_TK = torch.cat([shape.largest_TK for shape in shapes]).double()
    ratios_TK = (largest_TK[:, :-1] - largest_TK[:, 1:]).exp()
    ratios_T2 = torch.nn.functional.pad(ratios_TK, (0, _TOP - largest_TK.shape[1]), value=1.0)
    columns_T4 = torch.cat([torch.ones_like(entropy_T1), entropy_T1, ratios_T2], dim=1)
    if any(shape.valid_T1 is not None for shape in shapes):
        valid = [_valid(shape) for shape in shapes]
        columns_T4 = columns_T4.masked_fill(~torch.cat(valid), 0.0)
    return columns_T4.sum(dim=0)


def _valid(shape: GateShape) -> Tensor:
    if shape.valid_T1 is not None:
        return shape.valid_T1
    return torch.ones_like(shape.entropy_T, dtype=torch.bool).unsqueeze(1)


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
