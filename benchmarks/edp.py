"""EDP's token dispatchers against Megatron's own on the same mesh: bytes, collectives, host reads, passes, time.

    python benchmarks/edp.py > benchmarks/edp.md

Four gloo ranks on the CPU, one MoE layer with TP = EP = 4 and ETP = 1, forward and backward. The router is
replaced by fixed routing, the same for every dispatcher. What Megatron's dispatchers need to run without a
GPU is in `on_cpu`.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any
from unittest import mock

import torch
from edp_tables import measured_table, passes_table, scheme_table
from fused_permutation import installed
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.moe import token_dispatcher
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import apply_router_token_dropping
from row_passes import RowPasses, StandInExperts
from torch import Tensor, distributed
from wire import HostReads, Wire

from nemo_skymoe import traffic
from nemo_skymoe.moe.layer import SkyworkMoELayer, SkyworkTransformerConfig
from nemo_skymoe.patches import cpu_cuda, cpu_runtime
from nemo_skymoe.ranks import run_ranks

RANKS, EXPERTS, TOPK, HIDDEN, FFN = 4, 16, 2, 4608, 32
TOKENS = 480
REPEATS = 5


@dataclass(frozen=True)
class Setting:
    """One row of the table: a dispatcher and what it has to move."""

    dispatcher: str
    capacity_factor: float | None = None
    padded: bool = False
    weights: torch.dtype = torch.float32
    hidden: int = HIDDEN
    tokens: int = TOKENS

    @property
    def stock(self) -> bool:
        """Megatron's own."""
        return self.dispatcher.startswith("stock")

    @property
    def split(self) -> bool:
        """Sequence parallelism."""
        return self.dispatcher != "replicated"


@dataclass(frozen=True)
class Passes:
    """Kernels that go over rows, in both passes of one layer on one rank, and the bytes that they read and write."""

    kernels: int
    moved: int


@dataclass(frozen=True)
class Measured:
    """Counts of one rank in one layer: bytes sent, bytes by the formula, calls, waits of the host, passes, seconds."""

    forward: float
    backward: float
    formula: traffic.Traffic
    calls: dict[str, int]
    host_waits: int
    recomputed_waits: int
    passes: Passes
    fused_passes: Passes
    seconds: float


class FixedRouting(torch.nn.Module):
    """Stands in for a router: this rank's weights [t, E], 0 where an expert does not take the token."""

    def __init__(self, weights_tE: Tensor, map_tE: Tensor) -> None:
        super().__init__()
        self.weights = torch.nn.Parameter(weights_tE)
        self.map = map_tE
        self.layer_number = 1

    def forward(self, *_: Tensor | None) -> tuple[Tensor, Tensor]:
        """Weights and routing map, as Megatron's routers return them."""
        return self.weights * self.map, self.map


def routing(setting: Setting, rank: int) -> FixedRouting:
    """Uniform: dropless every pair of experts equally often, with a capacity pairs drawn at random."""
    generator = torch.Generator().manual_seed(rank)
    if setting.capacity_factor is None:
        pairs = torch.tensor(list(combinations(range(EXPERTS), TOPK)))
        chosen = pairs.repeat(setting.tokens // len(pairs), 1)
    else:
        chosen = torch.rand(setting.tokens, EXPERTS, generator=generator).topk(TOPK, dim=1).indices
    weights = torch.rand(setting.tokens, EXPERTS, generator=generator) * 0.5 + 0.25
    chosen_map = torch.zeros(setting.tokens, EXPERTS, dtype=torch.bool).scatter(1, chosen, True)
    weights = weights * chosen_map
    if setting.capacity_factor is not None:
        weights, chosen_map = apply_router_token_dropping(
            weights, chosen_map, TOPK, setting.capacity_factor, pad_to_capacity=setting.padded
        )
    return FixedRouting(weights.to(setting.weights), chosen_map)


def build(setting: Setting, recompute: bool = False) -> Any:
    """The MoE layer of a setting, its router replaced; with its forward pass run again in the backward pass."""
    config = SkyworkTransformerConfig(
        num_layers=1,
        hidden_size=setting.hidden,
        ffn_hidden_size=FFN,
        num_attention_heads=4,
        num_moe_experts=EXPERTS,
        moe_router_topk=TOPK,
        moe_router_load_balancing_type="aux_loss",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        bias_dropout_fusion=False,
        use_cpu_initialization=True,
        params_dtype=torch.bfloat16,
        bf16=True,
        tensor_model_parallel_size=RANKS,
        expert_model_parallel_size=RANKS,
        expert_tensor_parallel_size=1,
        sequence_parallel=setting.split,
        moe_token_dispatcher_type=setting.dispatcher.split()[-1] if setting.stock else "allgather",
        moe_expert_capacity_factor=setting.capacity_factor,
        moe_pad_expert_input_to_capacity=setting.padded,
        moe_edp=not setting.stock,
        edp_dispatcher="auto" if setting.stock else setting.dispatcher,
        recompute_granularity="selective" if recompute else None,
        recompute_modules=["moe"] if recompute else None,
    )
    spec: Any = get_gpt_layer_local_spec(num_experts=EXPERTS, moe_grouped_gemm=False)
    mlp = spec.submodules.mlp
    experts = mlp.keywords["submodules"] if isinstance(mlp, functools.partial) else mlp.submodules
    layer: Any = (MoELayer if setting.stock else SkyworkMoELayer)(config, experts)
    pieces = [routing(setting, rank) for rank in range(RANKS)]
    layer.router = pieces[distributed.get_rank()]
    if not setting.split:
        # Without sequence parallelism every rank has everyone's tokens.
        layer.router = FixedRouting(
            torch.cat([piece.weights.data for piece in pieces]), torch.cat([piece.map for piece in pieces])
        )
    return layer


@contextmanager
def on_cpu(reads: HostReads) -> Iterator[None]:
    """Let Megatron's all-to-all dispatcher run without a GPU, and count where a GPU run would wait.

    It moves counts to the host only from a GPU, and then waits once for all of them.
    """

    def move(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        if not isinstance(tensor, Tensor):
            return tensor
        copy = reads.mark(tensor.clone())
        return copy.tolist() if as_numpy else copy

    def synchronize(*_: Any) -> None:
        reads.count += 1

    with (
        mock.patch.object(token_dispatcher, "maybe_move_tensor_to_cpu", move),
        mock.patch.object(cpu_cuda.Stream, "synchronize", synchronize),
    ):
        yield


def measure(setting: Setting) -> Measured:
    """Bytes, calls and waits of one pass, then the time of several."""
    layer, hidden = build(setting), hidden_of(setting)
    reads, forward, backward = HostReads(), Wire(), Wire()
    waits = run_once(layer, hidden, reads, forward, backward)
    with on_cpu(reads):
        seconds = [timed(layer, hidden) for _ in range(REPEATS)]
    exchange = exchange_of(setting)
    return Measured(
        forward.sent,
        backward.sent,
        getattr(traffic, setting.dispatcher.replace(" ", "_"))(exchange),
        dict(forward.calls + backward.calls),
        waits,
        recomputed_waits=run_once(build(setting, recompute=True), hidden, HostReads(), Wire(), Wire()),
        passes=count_passes(setting, fused=False),
        fused_passes=count_passes(setting, fused=True),
        seconds=statistics.median(seconds),
    )


def hidden_of(setting: Setting) -> Tensor:
    """Return this rank's tokens."""
    tokens = setting.tokens * (1 if setting.split else RANKS)
    return torch.randn(tokens, 1, setting.hidden).bfloat16().requires_grad_()


def run_once(layer: Any, hidden: Tensor, reads: HostReads, forward: Wire, backward: Wire) -> int:
    """Watch a forward and a backward pass, and return how often the host would wait."""
    for name in ("sort_input_by_local_experts", "restore_output_by_local_experts"):
        if hasattr(layer.token_dispatcher, name):
            reads.mark(getattr(layer.token_dispatcher, name))
    with on_cpu(reads), reads:
        with forward.watching():
            output, _ = layer(hidden)
        with backward.watching(), reads.in_backward():
            output.backward(torch.ones_like(output))
    return reads.count


def count_passes(setting: Setting, fused: bool) -> Passes:
    """Count the passes over rows around experts that do not count, with or without `moe_permute_fusion`."""
    layer = build(setting)
    layer.experts, hidden = StandInExperts(), hidden_of(setting)
    # Only now: if told before, Megatron's all-to-all would put its indices on a GPU.
    layer.token_dispatcher.config.moe_permute_fusion = layer.token_dispatcher.fused = fused
    gradient = torch.ones_like(hidden)
    with on_cpu(HostReads()), installed(), Wire().watching(), RowPasses(setting.hidden) as passes:
        output, _ = layer(hidden)
        output.backward(gradient)
    return Passes(len(passes.kernels), passes.moved)


def timed(layer: Any, hidden: Tensor) -> float:
    """Seconds of a forward and a backward pass, started together."""
    distributed.barrier()
    start = time.perf_counter()
    output, _ = layer(hidden)
    output.backward(torch.ones_like(output))
    return time.perf_counter() - start


def exchange_of(setting: Setting) -> traffic.Exchange:
    """Return what the formula is told: sizes and, if a capacity drops at random, the rows that this rank sends."""
    exchange = traffic.Exchange(
        RANKS,
        setting.tokens,
        setting.hidden,
        EXPERTS,
        TOPK,
        dtype_bytes=2,
        weight_bytes=setting.weights.itemsize,
        capacity_factor=setting.capacity_factor,
        padded=setting.padded,
    )
    if setting.capacity_factor is None or setting.padded:
        return exchange
    maps = [routing(setting, rank).map.view(setting.tokens, RANKS, -1) for rank in range(RANKS)]
    mine, rank = maps[distributed.get_rank()], distributed.get_rank()
    rows = mine.sum(dim=-1) if setting.stock else mine.any(dim=-1)
    sent = int(rows.sum() - rows[:, rank].sum())
    theirs = [one.sum(dim=-1) if setting.stock else one.any(dim=-1) for one in maps]
    received = int(sum(one[:, rank].sum() for other, one in enumerate(theirs) if other != rank))
    return replace(exchange, rows=sent, rows_received=received)


def run(settings: list[Setting]) -> list[Measured]:
    """All settings on this rank."""
    cpu_runtime.apply()
    distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel(
        RANKS, expert_model_parallel_size=RANKS, expert_tensor_parallel_size=1
    )
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    return [measure(setting) for setting in settings]


DISPATCHERS = ("stock allgather", "stock alltoall", "replicated", "allgather", "alltoall")
SECTIONS: dict[str, list[Setting]] = {
    "Dropless": [Setting(name) for name in DISPATCHERS],
    "Dropless, router weights in bfloat16 (Megatron's default)": [
        Setting(name, weights=torch.bfloat16) for name in DISPATCHERS
    ],
    "Capacity factor 1, per rank, not padded": [Setting(name, 1.0) for name in DISPATCHERS],
    "Capacity factor 1.25, per rank, padded": [Setting(name, 1.25, True) for name in DISPATCHERS],
}


def main() -> None:
    """Print the tables as Markdown."""
    settings = [setting for section in SECTIONS.values() for setting in section]
    by_rank = run_ranks(run, RANKS, settings)
    measured = dict(zip(settings, zip(*by_rank, strict=True), strict=True))
    print(HEADER.format(**globals()))
    for title, section in SECTIONS.items():
        rows = {setting.dispatcher: measured[setting] for setting in section}
        print(measured_table(title, rows))
        print(passes_table(rows))
    print(SCHEMES)
    print(scheme_table(HIDDEN, EXPERTS))


HEADER = """# EDP token dispatchers

`python benchmarks/edp.py > benchmarks/edp.md`

One MoE layer on {RANKS} gloo ranks, TP = EP = {RANKS}, ETP = 1: {EXPERTS} experts, top-{TOPK}, hidden {HIDDEN} in bfloat16,
{TOKENS} tokens a rank under sequence parallelism ({RANKS} times as many without), uniform routing, router weights in
float32 as `SkyworkRouter` returns them.

- **Bytes** are means over the ranks, in the ring convention. They are counted by wrapping `torch.distributed` (`wire.py`,
  which shares no code with the formula), and include weights, expert numbers and counts.
- **Formula** compares them with `nemo_skymoe/traffic.py`. "equal" means equal to the byte on every rank. With a capacity,
  the formula is told how many rows the random routing made.
- **Host waits** are the places in a forward and backward pass, experts included, where the host of a GPU run would wait for
  the device: it reads values, or the shape of a result depends on values; and the same with the layer recomputed. Stock
  runs without fused permutation.
- **Stock** is Megatron-Core's dispatcher. It is changed only as a CPU requires: CUDA streams are inert, and counts are
  copied to the host although they are there already.
- **Passes** are kernels that go over hidden rows in a forward and backward pass, experts and collectives left out, and
  the MB that they read and write (`row_passes.py`). "Fused" is `moe_permute_fusion=True`, with stand-ins of one kernel
  for each function of Transformer Engine. They are counts; how long a GPU takes for them was not measured.
- **Time** is secondary: four ranks share the cores of one machine, experts are {FFN} wide, and gloo makes a
  reduce-scatter of an all-reduce.
"""

SCHEMES = f"""## Where each wins, by the formulas

MB that a rank sends in one layer, both passes, for the 8192 tokens of a group of n ranks: dropless, bfloat16, router
weights in float32. Times are of the better EDP dispatcher with sequence parallelism on the links of the report's
cluster (A800: NVLink 200 GB/s a direction, RoCE 800 Gb/s a node of 8 GPUs), and of the report's other meshes with
stock all-to-all over the {EXPERTS} / n data-parallel groups that make as many ranks as experts: ETP has Size_EP = Size_DP
and splits experts over the n ranks, EP has Size_EP = Size_DP x Size_TP. Messages in the node and beyond travel at once.
"""

if __name__ == "__main__":
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    main()
