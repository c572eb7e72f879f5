"""The time that collectives take, from the bytes that a rank moves and the place of its group in the cluster.

Megatron numbers ranks tensor (or expert) parallel first, then data, then pipeline parallel, and nodes are filled in
that order. Collectives run as rings: a rank passes on (n - 1)/n of all that is gathered or reduced.
"""

from dataclasses import dataclass

from nemo_skymoe.pipeline.efficiency import Efficiency
from nemo_skymoe.pipeline.hardware import Hardware


@dataclass(frozen=True)
class Group:
    """`size` ranks, each `stride` ranks after the one before."""

    size: int
    stride: int = 1

    def in_node(self, gpus_per_node: int) -> int:
        """Ranks of the group that share a node."""
        return min(self.size, max(1, gpus_per_node // self.stride))


@dataclass(frozen=True)
class Links:
    """The links of a cluster."""

    hardware: Hardware
    efficiency: Efficiency

    def ring(self, gathered: float, group: Group) -> float:
        """Return the seconds of one all-gather or reduce-scatter of `gathered` bytes. An all-reduce takes twice as
        long.

        Between nodes there are as many rings as the group has ranks in a node. Each has a network adapter of its own.
        """
        local = group.in_node(self.hardware.gpus_per_node)
        rate = self.hardware.nvlink
        if local < group.size:
            rate = min(rate, local * self.hardware.network)
        return gathered * (group.size - 1) / group.size / (rate * self.efficiency.links)

    def all_to_all(self, sent: float, group: Group) -> float:
        """Return the seconds that every rank takes to deal out `sent` bytes evenly, of which it keeps its own share."""
        local = group.in_node(self.hardware.gpus_per_node)
        near = sent * (local - 1) / group.size / self.hardware.nvlink
        far = sent * (group.size - local) / group.size / self.hardware.network
        return max(near, far) / self.efficiency.links

    def point_to_point(self, sent: float, stride: int) -> float:
        """Return the seconds that it takes to send bytes to the rank `stride` further on."""
        near = stride < self.hardware.gpus_per_node
        return sent / ((self.hardware.nvlink if near else self.hardware.network) * self.efficiency.links)
