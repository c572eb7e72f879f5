"""What a router observes: sums on the device, reduced once for all layers, and the metrics made of them.

Nothing here synchronises with the host in the forward pass. Shape suffixes: T tokens, E experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class LayerMetrics:
    """One MoE layer over one optimizer step: all micro-batches, all ranks that hold its tokens."""

    drop_rate: float
    """Dropped assignments / (k * tokens); virtual, at the nominal capacity factor, in dropless training."""
    aux_loss: float
    """Auxiliary loss without its coefficient, mean over micro-batches and data-parallel ranks."""
    load_max_over_mean: float
    """Assignments of the busiest expert / mean over the experts, before dropping."""
    gate_entropy: float
    """Mean entropy of a token's gate, nats."""
    max1_over_max2: float
    """Mean ratio of a token's largest to its second gate value (Figure 3); NaN with one expert."""
    max2_over_max3: float
    """Mean ratio of a token's second to its third gate value (Figure 3); NaN with fewer than three experts."""
    load: tuple[float, ...]
    """Share of the assignments each expert got before dropping."""


METRICS = tuple(field.name for field in fields(LayerMetrics) if field.name != "load")
_OBSERVED = 4


class RouterStatistics:
    """Running sums of one router since they were last taken.

    Every entry is a sum over tokens or micro-batches, so ranks and steps combine by addition alone.
    """

    def __init__(self, num_experts: int, topk: int) -> None:
        self.num_experts = num_experts
        self.topk = topk
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._tokens = 0
        self._micro_batches = 0.0
        self._observed: Tensor | None = None
        self._aux_loss: Tensor | None = None

    def observe(
        self, logits_TE: Tensor, scores_TE: Tensor, top_TK: Tensor, load_E: Tensor, capacity: int
    ) -> None:
        """Add one micro-batch.

        Args:
            logits_TE: Gating logits as the top-k saw them.
            scores_TE: Their softmax.
            top_TK: Largest logits of each token, descending, at least min(3, E) of them.
            load_E: Assignments per expert before dropping.
            capacity: Assignments an expert can take.
        """
        zero = logits_TE.new_zeros(())
        # Kept per expert is min(load, capacity) under either drop policy.
        dropped = (load_E - capacity).clamp_min(0).sum().to(logits_TE.dtype)
        log_max_T = scores_TE.amax(dim=-1).log()
        entropy = (top_TK[:, 0] - log_max_T).sum() - torch.dot(scores_TE.flatten(), logits_TE.flatten())
        steps_T = (top_TK[:, :-1] - top_TK[:, 1:]).exp().sum(dim=0)
        ratios = [steps_T[i] if i < steps_T.shape[0] else zero for i in range(2)]
        sums = torch.cat([torch.stack([dropped, entropy, *ratios]), load_E.to(logits_TE.dtype)]).double()
        self._observed = sums if self._observed is None else self._observed + sums
        self._tokens += logits_TE.shape[0]

    def observe_aux_loss(self, share: Tensor, group_size: int) -> None:
        """Add a micro-batch's auxiliary loss: this rank's share of it, coefficient removed."""
        value = share.detach().double().reshape(())
        self._aux_loss = value if self._aux_loss is None else self._aux_loss + value
        self._micro_batches += 1.0 / group_size

    def take(self, device: torch.device) -> Tensor:
        """[3 + 4 + E] float64 sums since the last call, which are then forgotten."""
        observed = self._observed
        if observed is None:
            observed = torch.zeros(_OBSERVED + self.num_experts, dtype=torch.float64, device=device)
        aux_loss = self._aux_loss
        if aux_loss is None:
            aux_loss = torch.zeros((), dtype=torch.float64, device=device)
        counts = torch.tensor([self._tokens, self._micro_batches], dtype=torch.float64).to(
            device, non_blocking=True
        )
        sums = torch.cat([counts, aux_loss.reshape(1), observed])
        self.reset()
        return sums


def reduce_statistics(
    statistics: Sequence[RouterStatistics], group: torch.distributed.ProcessGroup, device: torch.device
) -> list[LayerMetrics]:
    """Take the sums of all local layers, add them over `group` in one reduction, and make metrics of them.

    The counts are integers held in float64, so every rank ends with the same bits.
    """
    if not statistics:
        return []
    packed = torch.stack([entry.take(device) for entry in statistics])
    torch.distributed.all_reduce(packed, group=group)
    rows = packed.tolist()
    return [_metrics(row, entry.topk) for row, entry in zip(rows, statistics, strict=True)]


def _metrics(row: list[float], topk: int) -> LayerMetrics:
    tokens, micro_batches, aux_loss, dropped, entropy, first, second, *load = row
    per_token = 1.0 / max(tokens, 1.0)
    assignments = max(sum(load), 1.0)
    return LayerMetrics(
        drop_rate=min(dropped / max(topk * tokens, 1.0), 1.0),
        aux_loss=aux_loss / micro_batches if micro_batches else 0.0,
        load_max_over_mean=max(load) * len(load) / assignments,
        gate_entropy=entropy * per_token,
        max1_over_max2=first * per_token if len(load) > 1 else float("nan"),
        max2_over_max3=second * per_token if len(load) > 2 else float("nan"),
        load=tuple(value / assignments for value in load),
    )
