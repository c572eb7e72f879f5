"""EDP without sequence parallelism. Every rank holds the tokens already, so one all-reduce of the outputs is enough."""

from typing import Any

import torch
from torch import Tensor

from nemo_skymoe.moe.collectives import (
    Exchange,
    begin_copy_to_group,
    begin_reduce_from_group,
    copy_to_group,
    hold,
)
from nemo_skymoe.moe.dispatcher import EdpTokenDispatcher
from nemo_skymoe.moe.expert_group import ExpertGroup
from nemo_skymoe.moe.permutation import Permutation, by_capacity


class RoutingDiverged(RuntimeError):
    """Ranks that hold the same tokens route them differently. The message names the layer and the group."""


class ReplicatedTokenDispatcher(EdpTokenDispatcher):
    """Each rank takes its experts' rows from its own copy of the tokens; an all-reduce combines the outputs.

    The forward pass only reads hidden states and weights. In the backward pass each rank knows the gradient of its own
    experts alone. This makes three corrections necessary: `share_tokens`, `share_weights`, and `edp.exclude_replicas`
    for the router's losses. Without any one of them the loss is right, but the gradients are wrong.
    """

    kind = "replicated"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._check_every: int = self.config.edp_replica_check_interval
        self._calls = 0

    def dispatch_preprocess(
        self, tokens: Tensor, routing_map: Tensor, probs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the tokens as [T, H], and the weights of the local experts [T, e]."""
        hidden_TH, weights_TE = super().dispatch_preprocess(tokens, routing_map, probs)
        weights_TK, experts_TK = self.assignments(weights_TE)
        if self._check_every and not self.reads.repeats():
            self._calls += 1
            if self._calls % self._check_every == 0:
                check_replicas(weights_TK, experts_TK, self.ranks)
        weights_TE = self.spread(self.share_weights(weights_TK), experts_TK)
        return hidden_TH, weights_TE[:, self.local_experts]

    def begin_dispatch(self, hidden_states: Tensor, probs: Tensor) -> tuple[Exchange, Exchange]:
        """Take tokens [T, H] and weights [T, e], which are there."""
        return self.share_tokens(hidden_states), hold(probs)

    def share_tokens(self, hidden_TH: Tensor) -> Exchange:
        """Return the tokens; their gradient is the sum of the gradients from the experts of all ranks."""
        return begin_copy_to_group(hidden_TH, self.ranks)

    def share_weights(self, weights_TK: Tensor) -> Tensor:
        """Return the weights; the rank of its expert alone knows a weight's gradient, and the sum spreads it."""
        return copy_to_group(weights_TK, self.ranks)

    def permutation(self, weights_Re: Tensor) -> Permutation:
        """Assign the tokens to local experts; with capacity padding the shapes are fixed."""
        if self.padded:
            return by_capacity(weights_Re, self.capacity(weights_Re.shape[0]), fused=self.fused)
        return super().permutation(weights_Re)

    def begin_combine(self, hidden_states: Tensor) -> Exchange:
        """Begin to sum the outputs [T, H] over the ranks."""
        return begin_reduce_from_group(hidden_states, self.ranks)


@torch.no_grad()
def check_replicas(weights_TK: Tensor, experts_TK: Tensor, ranks: ExpertGroup) -> None:
    """Compare a checksum of the routing over the group, which costs one small all-gather and one read by the host.

    Raises:
        RoutingDiverged: The routing of any two ranks differs in a bit. Every rank of the group raises it.
    """
    integer = torch.int64 if weights_TK.element_size() == 8 else torch.int32
    bits = torch.stack([weights_TK.contiguous().view(integer).long(), experts_TK.long()]).flatten()
    # The multipliers are odd, hence invertible modulo 2^64, where the sum wraps around: a changed entry always
    # changes the sum. They differ, so that exchanged entries change it too.
    odd = 2 * torch.arange(bits.shape[0], device=bits.device) + 1
    checksum = (bits * odd * 0x9E3779B97F4A7C1).sum().reshape(1)
    checksums = ranks.read(ranks.all_gather(checksum)).tolist()
    if len(set(checksums)) > 1:
        differing = [rank for rank, value in enumerate(checksums) if value != checksums[0]]
        raise RoutingDiverged(
            f"{ranks}: the replicated tokens are routed differently from the group's rank 0 on its ranks"
            f" {differing}; expected the same hidden states, router weights and random numbers on every rank"
        )
