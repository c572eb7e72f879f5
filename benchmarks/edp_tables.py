"""The tables of edp.py, and the arithmetic of the three meshes in time."""

from collections.abc import Mapping, Sequence
from typing import Any

from nemo_skymoe import traffic
from nemo_skymoe.traffic import Exchange

# The report's cluster (B.3), per GPU and direction: NVLink 400 GB/s in both together, RoCE 800 Gb/s a node of 8.
NVLINK = 200e9
ROCE = 800e9 / 8 / 8
NODE = 8
SEQUENCE = 8192


def measured_table(title: str, rows: Mapping[str, Sequence[Any]]) -> str:
    """One line a dispatcher; figures of all ranks, bytes their mean."""
    lines = [
        f"## {title}\n",
        "| dispatcher | sent forward, MB | sent backward, MB | formula | of stock allgather | of stock alltoall"
        " | collectives | host waits | recomputed | time, ms |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    total = {name: mean(rank.forward + rank.backward for rank in ranks) for name, ranks in rows.items()}
    for name, ranks in rows.items():
        exact = all(
            abs(rank.forward - rank.formula.forward) < 1 and abs(rank.backward - rank.formula.backward) < 1
            for rank in ranks
        )
        cells = [
            name,
            f"{mean(rank.forward for rank in ranks) / 1e6:.3f}",
            f"{mean(rank.backward for rank in ranks) / 1e6:.3f}",
            "equal" if exact else "**differs**",
            f"{total[name] / total['stock allgather']:.3f}",
            f"{total[name] / total['stock alltoall']:.3f}",
            ", ".join(f"{count} {call}" for call, count in sorted(ranks[0].calls.items())),
            str(ranks[0].host_waits),
            str(ranks[0].recomputed_waits),
            f"{1e3 * max(rank.seconds for rank in ranks):.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def passes_table(rows: Mapping[str, Sequence[Any]]) -> str:
    """One line a dispatcher: passes over rows and the memory they move, the means of all ranks."""
    lines = [
        "| dispatcher | passes | MB read and written | passes, fused | MB, fused |",
        "|---|---|---|---|---|",
    ]
    for name, ranks in rows.items():
        cells = [name]
        for kind in ("passes", "fused_passes"):
            found = [getattr(rank, kind) for rank in ranks]
            cells += [
                f"{mean(one.kernels for one in found):g}",
                f"{mean(one.moved for one in found) / 1e6:.0f}",
            ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def scheme_table(hidden: int, experts: int) -> str:
    """Return a table by the formulas: what every dispatcher sends for n ranks and k experts, and the meshes beside EDP."""
    lines = [
        "| n | k | replicated | allgather | alltoall | stock allgather | stock alltoall | fewest, with SP | EDP on"
        " NVLink, us | EDP on RoCE, us | ETP mesh, us | EP mesh, us |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for ranks in (2, 4, 8):
        for topk in (1, 2, 4, 8):
            x = Exchange(ranks, SEQUENCE // ranks, hidden, experts, topk)
            names = ("replicated", "allgather", "alltoall", "stock_allgather", "stock_alltoall")
            sent = {name: getattr(traffic, name)(x).total for name in names}
            best = min(("alltoall", "allgather"), key=sent.__getitem__)
            cells = [ranks, topk, *(f"{sent[name] / 1e6:.1f}" for name in names), best]
            cells += [f"{1e6 * sent[best] / link:.0f}" for link in (NVLINK, ROCE)]
            data = experts // ranks
            cells += [f"{1e6 * etp_seconds(x, data):.0f}", f"{1e6 * ep_seconds(x, data):.0f}"]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def ep_seconds(x: Exchange, data: int) -> float:
    """The report's EP mesh: stock all-to-all over DP x TP ranks, nodes of 8 in a row."""
    peers = x.ranks * data
    everywhere = Exchange(peers, x.tokens, x.hidden_size, x.num_experts, x.topk)
    near = min(NODE, peers) - 1
    return links(traffic.stock_alltoall(everywhere).total, near, peers - 1 - near)


def etp_seconds(x: Exchange, data: int) -> float:
    """The report's ETP mesh: stock all-to-all over the DP ranks, gathered and reduced over the TP ranks."""
    across = Exchange(data, x.tokens, x.hidden_size, x.num_experts, x.topk)
    near = min(max(NODE // x.ranks, 1), data) - 1
    seconds = links(traffic.stock_alltoall(across).total, near, data - 1 - near) if data > 1 else 0.0
    # What a rank received goes to the other n - 1, whose parts of the outputs come back in the weights' dtype.
    row = x.hidden_bytes + x.weight_bytes + x.hidden_size * x.weight_bytes
    return seconds + 2 * (x.ranks - 1) * x.tokens * x.topk * row / NVLINK


def links(sent: float, near: int, far: int) -> float:
    """Seconds to send bytes spread evenly over peers in the node and beyond, both links at once."""
    return max(sent * near / (near + far) / NVLINK, sent * far / (near + far) / ROCE)


def mean(values: Any) -> float:
    """Return the mean of an iterable."""
    found = list(values)
    return sum(found) / len(found)
