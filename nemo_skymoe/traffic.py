"""Count the bytes that a rank sends for one MoE layer, by dispatcher, from which `edp_dispatcher="auto"` follows.

The counts use the ring convention. To gather or to reduce-scatter a piece, a rank sends it n - 1 times. An all-reduce
does both. An all-to-all sends all pieces but one's own. Routing is taken as uniform: every set of k experts is as
likely as any other. This is plain arithmetic without torch.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Exchange:
    """The sizes of the exchange of an MoE layer.

    Attributes:
        ranks: n, the ranks that share the experts.
        tokens: Tokens of one rank under sequence parallelism; the group has n times as many.
        hidden_size: H.
        num_experts: E.
        topk: k.
        dtype_bytes: Bytes of a hidden element.
        weight_bytes: Bytes of a router weight.
        capacity_factor: None for dropless.
        padded: Experts' inputs are padded to their capacity.
        rows: Rows a rank sends to others in one all-to-all, if known; else what uniform routing makes.
        rows_received: Rows it gets from others, if known; else as many.
    """

    ranks: int
    tokens: int
    hidden_size: int
    num_experts: int
    topk: int
    dtype_bytes: int = 2
    weight_bytes: int = 4
    capacity_factor: float | None = None
    padded: bool = False
    rows: float | None = None
    rows_received: float | None = None

    @property
    def others(self) -> int:
        """Number of other ranks, n - 1."""
        return self.ranks - 1

    @property
    def local_experts(self) -> int:
        """Number of local experts, e = E / n."""
        return self.num_experts // self.ranks

    @property
    def hidden_bytes(self) -> int:
        """Bytes of one token's hidden state."""
        return self.hidden_size * self.dtype_bytes

    @property
    def expert_bytes(self) -> int:
        """Bytes of an expert's number."""
        return 1 if self.num_experts <= 256 else 4

    @property
    def capacity(self) -> int:
        """Number of rows that an expert takes of one rank's tokens."""
        assert self.capacity_factor is not None
        return math.ceil(self.tokens * self.topk / self.num_experts * self.capacity_factor)

    @property
    def kept(self) -> float:
        """Share of the assignments that are left after dropping."""
        if self.capacity_factor is None:
            return 1.0
        return min(1.0, self.capacity * self.num_experts / (self.tokens * self.topk))


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank sends in one layer."""

    forward: float
    backward: float

    @property
    def total(self) -> float:
        """Bytes of both passes. Recomputation would add another `forward`."""
        return self.forward + self.backward


def replicated(x: Exchange) -> Traffic:
    """Count an all-reduce of the outputs forward, and one of the gradients of tokens and k weights backward."""
    all_reduce = 2 * x.others / x.ranks * (x.ranks * x.tokens)
    return Traffic(all_reduce * x.hidden_bytes, all_reduce * (x.hidden_bytes + x.topk * x.weight_bytes))


def allgather(x: Exchange) -> Traffic:
    """Count hidden states out and back, with k weights per token and, forward, their experts' numbers."""
    sent = x.others * x.tokens
    weights = x.topk * x.weight_bytes
    return Traffic(
        sent * (2 * x.hidden_bytes + weights + x.topk * x.expert_bytes),
        sent * (2 * x.hidden_bytes + weights),
    )


def alltoall(x: Exchange) -> Traffic:
    """Count a row for each pair of a token and another rank that has an expert for it, out and back.

    With a row go its e weights, and forward 1 + e counts (int32) to every rank. If experts are padded, there are a row
    and one weight for every place of every expert elsewhere, and no counts.
    """
    if x.padded:
        sent = x.others * x.local_experts * x.capacity * (2 * x.hidden_bytes + x.weight_bytes)
        return Traffic(sent, sent)
    rows = x.others * x.tokens * probability_of_rank(x) if x.rows is None else x.rows
    counts = x.others * (1 + x.local_experts) * 4
    return _there_and_back(x, rows, x.local_experts * x.weight_bytes, counts)


def stock_allgather(x: Exchange) -> Traffic:
    """Count Megatron's all-gather, with the routing map and all E weights, and the combine in the weights' dtype."""
    sent = x.others * x.tokens
    combine = x.hidden_size * x.weight_bytes
    weights = x.num_experts * x.weight_bytes
    return Traffic(
        sent * (x.hidden_bytes + combine + weights + x.num_experts),
        sent * (x.hidden_bytes + combine + weights),
    )


def stock_alltoall(x: Exchange) -> Traffic:
    """Count Megatron's all-to-all: a row and a weight for every assignment elsewhere, and E gathered int64 counts."""
    if x.padded:
        return alltoall(x)
    rows = x.others / x.ranks * x.tokens * x.topk * x.kept if x.rows is None else x.rows
    return _there_and_back(x, rows, x.weight_bytes, x.others * x.num_experts * 8)


def _there_and_back(x: Exchange, rows: float, beside: int, counts: int) -> Traffic:
    """Count rows that go out with their weights and come back without; backward it is the other way round."""
    received = rows if x.rows_received is None else x.rows_received
    hidden = (rows + received) * x.hidden_bytes
    return Traffic(hidden + rows * beside + counts, hidden + received * beside)


def probability_of_rank(x: Exchange) -> float:
    """Return how likely a token has an expert on a given rank, of its k minus those that a capacity drops at random."""
    sets = math.comb(x.num_experts, x.topk)
    missed = 0.0
    for here in range(min(x.local_experts, x.topk) + 1):
        ways = math.comb(x.local_experts, here) * math.comb(x.num_experts - x.local_experts, x.topk - here)
        missed += ways / sets * (1.0 - x.kept) ** here
    return 1.0 - missed


def per_token(traffic: Traffic, x: Exchange) -> float:
    """Return the bytes that a rank sends per token of its own, in both passes."""
    return traffic.total / x.tokens
