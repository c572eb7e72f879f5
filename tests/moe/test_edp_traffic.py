"""What the dispatchers send, by the benchmark's own counting: equal to the formula, and less than stock."""

import importlib
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_skymoe import traffic
from nemo_skymoe.ranks import run_ranks
from nemo_skymoe.traffic import Exchange
from tests.cases import every

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
TOKENS = 120


@pytest.fixture(scope="module")
def benchmark() -> Iterator[Any]:
    """The script, its sizes but for the number of tokens."""
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module("edp")
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def measured(benchmark: Any) -> dict[Any, list[Any]]:
    benchmark.REPEATS = 1
    settings = [
        benchmark.Setting(name, capacity, padded, weights, tokens=TOKENS)
        for name in benchmark.DISPATCHERS
        for capacity, padded in ((None, False), (1.0, False), (1.25, True))
        for weights in (torch.float32, torch.bfloat16)
    ]
    by_rank = run_ranks(benchmark.run, benchmark.RANKS, settings)
    return dict(zip(settings, zip(*by_rank, strict=True), strict=True))


def test_every_rank_sends_what_the_formula_says(measured: dict[Any, list[Any]]):
    assert len(measured) == 30
    for setting, ranks in measured.items():
        for rank in ranks:
            formula = rank.formula.forward, rank.formula.backward
            assert (rank.forward, rank.backward) == pytest.approx(formula, rel=0, abs=0.1), setting


def sent(measured: dict[Any, list[Any]], name: str, **wanted: Any) -> float:
    (ranks,) = [
        ranks
        for setting, ranks in measured.items()
        if setting.dispatcher == name and all(getattr(setting, key) == value for key, value in wanted.items())
    ]
    return sum(rank.forward + rank.backward for rank in ranks) / len(ranks)


@every("weights", (torch.float32, torch.bfloat16), ids=str)
@every("capacity", (None, 1.0))
def test_all_to_all_sends_less_than_stock(
    measured: dict[Any, list[Any]], weights: torch.dtype, capacity: float | None
):
    """bfloat16 weights are the harder comparison: float32 ones double what stock all-gather combines."""
    wanted = {"weights": weights, "capacity_factor": capacity}
    ours = sent(measured, "alltoall", **wanted)
    assert ours <= 0.46 * sent(measured, "stock allgather", **wanted)
    assert ours <= 0.92 * sent(measured, "stock alltoall", **wanted)


def test_all_gather_sends_no_more_than_stock(measured: dict[Any, list[Any]]):
    for weights, share in ((torch.float32, 0.67), (torch.bfloat16, 1.0)):
        wanted = {"weights": weights, "capacity_factor": None}
        assert sent(measured, "allgather", **wanted) < share * sent(measured, "stock allgather", **wanted)


def test_with_padding_nothing_is_read_and_no_more_is_sent(measured: dict[Any, list[Any]]):
    wanted = {"weights": torch.float32, "padded": True}
    assert sent(measured, "alltoall", **wanted) <= sent(measured, "stock alltoall", **wanted)
    for setting, ranks in measured.items():
        if setting.padded and not setting.stock:
            assert [rank.host_waits for rank in ranks] == [0] * len(ranks), setting
            assert [rank.recomputed_waits for rank in ranks] == [0] * len(ranks), setting


def test_without_padding_the_host_reads_once(measured: dict[Any, list[Any]]):
    for setting, ranks in measured.items():
        waits = {rank.host_waits for rank in ranks}
        if not setting.padded:
            # Megatron's own need three, and from megatron-core 0.17 on two.
            assert waits == {1} or (setting.stock and min(waits) >= 2), setting
            if not setting.stock:
                # What was read in the forward pass is kept.
                assert {rank.recomputed_waits for rank in ranks} == {1}, setting
            else:
                assert {rank.recomputed_waits for rank in ranks} == {2 * count for count in waits}, setting


def test_fewer_passes_over_rows_than_stock(measured: dict[Any, list[Any]]):
    """Of the two that send what ours send, and also with fused kernels, in kernels as in bytes."""

    def passes(name: str, fused: bool, **wanted: Any) -> tuple[float, float]:
        (ranks,) = [
            ranks
            for setting, ranks in measured.items()
            if setting.dispatcher == name
            and all(getattr(setting, key) == value for key, value in wanted.items())
        ]
        found = [rank.fused_passes if fused else rank.passes for rank in ranks]
        return max(one.kernels for one in found), sum(one.moved for one in found)

    for capacity, padded in ((None, False), (1.0, False), (1.25, True)):
        for weights in (torch.float32, torch.bfloat16):
            for fused in (False, True):
                wanted = {"capacity_factor": capacity, "padded": padded, "weights": weights, "fused": fused}
                for name in ("allgather", "alltoall"):
                    kernels, moved = passes(name, **wanted)
                    stock_kernels, stock_moved = passes(f"stock {name}", **wanted)
                    assert kernels <= stock_kernels and moved <= stock_moved, (name, wanted)
                    assert fused or kernels < stock_kernels


def test_a_wait_that_is_there_is_counted(benchmark: Any):
    """The counter itself: reads of values and shapes that depend on values, but not of what is on the host."""
    reads = benchmark.HostReads()
    device = torch.device("cpu")
    values = torch.ones(3)
    with reads:
        torch.arange(3).sum().item()
        torch.zeros(3, device="cpu").tolist()
        values.cpu().tolist()
        assert reads.count == 1
        torch.zeros(3, device=device).tolist()
        values[values > 0]
        values.masked_select(values > 0)
        int(values.sum())
        values.repeat_interleave(values.long())
        assert reads.count == 6


@every(("ranks", "experts", "topk"), [(2, 8, 2), (4, 16, 2), (8, 16, 8), (4, 4, 4)])
def test_probability_of_a_rank_is_what_drawing_shows(ranks: int, experts: int, topk: int):
    x = Exchange(ranks, 4096, 8, experts, topk)
    drawn = torch.rand(50_000, experts, generator=torch.Generator().manual_seed(0)).topk(topk, dim=1).indices
    seen = (drawn < x.local_experts).any(dim=1).double().mean().item()
    assert traffic.probability_of_rank(x) == pytest.approx(seen, abs=0.01)


def test_a_capacity_thins_the_rows():
    x = Exchange(4, 4096, 8, 16, 2, capacity_factor=0.5)
    assert x.kept == 0.5
    # Of the pairs on a rank both must be dropped.
    one, two = 4 * 12 / math.comb(16, 2), math.comb(4, 2) / math.comb(16, 2)
    assert traffic.probability_of_rank(x) == pytest.approx(0.5 * one + 0.75 * two)
