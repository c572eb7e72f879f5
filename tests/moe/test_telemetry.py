"""What a router reports, against the same numbers counted one token at a time."""

import math
from typing import Any
from unittest import mock

import pytest
import torch
from megatron.core import parallel_state
from torch import Tensor

from nemo_skymoe.moe.telemetry import (
    GATE_SAMPLE,
    METRICS,
    LayerMetrics,
    RouterStatistics,
    gate_shape,
    reduce_statistics,
)
from tests.cases import every
from tests.moe.worlds import (
    BATCH,
    LENGTH,
    Layout,
    configuration,
    context_positions,
    generator,
    groups,
    make_router,
    on_ranks,
    weight,
)

HIDDEN, MICRO_BATCHES = 16, 4
CPU = torch.device("cpu")

Token = tuple[int, Tensor]
"""A token's index in its micro-batch and its hidden state."""


def micro_batch(index: int) -> Tensor:
    """[sequence, batch, hidden], one token of it zero: equal logits."""
    x = torch.randn(LENGTH, BATCH, HIDDEN, generator=generator(f"micro-batch {index}"), dtype=torch.float64)
    x[3, 1] = 0
    return x


def tokens_at(index: int, positions: Tensor) -> list[Token]:
    x = micro_batch(index)
    return [(int(p) * BATCH + b, x[p, b]) for p in positions for b in range(BATCH)]


def gate_of(token: Token, config: Any) -> tuple[list[float], list[int]]:
    """Gate values and the experts from best to worst."""
    experts, index = config.num_moe_experts, token[0]
    z = (weight("weight", (experts, HIDDEN)) @ token[1]).tolist()
    if not any(z):
        if config.moe_router_logit_norm_scale is None:  # torch decides
            return [1 / experts] * experts, torch.zeros(experts).topk(config.moe_router_topk).indices.tolist()
        return [1 / experts] * experts, [
            (index * config.moe_router_topk + e) % experts for e in range(experts)
        ]
    if config.moe_router_logit_norm_scale is not None:
        mean = sum(z) / experts
        deviation = math.sqrt(sum((v - mean) ** 2 for v in z) / (experts - 1))
        z = [config.moe_router_logit_norm_scale * (v - mean) / deviation for v in z]
    gate = [math.exp(v) / sum(map(math.exp, z)) for v in z]
    return gate, sorted(range(experts), key=lambda expert: -gate[expert])


def token_by_token(config: Any, micro_batches: list[list[list[Token]]]) -> dict[str, Any]:
    """The metrics by their definitions. A micro-batch is a list of its ranks' tokens: each has its own capacity."""
    experts, topk = config.num_moe_experts, config.moe_router_topk
    factor = config.moe_expert_capacity_factor or config.moe_nominal_capacity_factor
    load, dropped, gates, aux_losses = [0] * experts, 0, [], []
    for parts in micro_batches:
        here, mean_gate = [0] * experts, [0.0] * experts
        for part in parts:
            found = [gate_of(token, config) for token in part]
            counts = [sum(expert in order[:topk] for _, order in found) for expert in range(experts)]
            capacity = math.ceil(len(part) * topk / experts * factor)
            dropped += sum(max(0, count - capacity) for count in counts)
            here = [a + b for a, b in zip(here, counts, strict=True)]
            gates += [sorted(gate, reverse=True) for gate, _ in found]
            mean_gate = [m + sum(gate[e] for gate, _ in found) for e, m in enumerate(mean_gate)]
        size = sum(map(len, parts))
        aux_losses.append(
            experts * sum(n * m for n, m in zip(here, mean_gate, strict=True)) / (topk * size * size)
        )
        load = [a + b for a, b in zip(load, here, strict=True)]
    return {
        "drop_rate": dropped / (topk * len(gates)),
        "aux_loss": sum(aux_losses) / len(aux_losses),
        "load_max_over_mean": max(load) / (sum(load) / experts),
        "gate_entropy": -sum(g * math.log(g) for gate in gates for g in gate) / len(gates),
        "max1_over_max2": sum(gate[0] / gate[1] for gate in gates) / len(gates),
        "max2_over_max3": sum(gate[1] / gate[2] for gate in gates) / len(gates) if experts > 2 else math.nan,
        "load": [n / sum(load) for n in load],
    }


def observed(layout: Layout, config: Any) -> LayerMetrics:
    """The metrics of the micro-batches routed in this layout, dealt over data-parallel ranks."""
    router = make_router(config)
    positions = context_positions().chunk(layout.tp)[parallel_state.get_tensor_model_parallel_rank()]
    ranks, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    for index in range(rank, MICRO_BATCHES, ranks):
        router(micro_batch(index)[positions].to(config.params_dtype).requires_grad_())
    group: Any = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
    with mock.patch.object(torch.distributed, "all_reduce", wraps=torch.distributed.all_reduce) as reduction:
        (metrics,) = reduce_statistics([router.statistics], group, CPU)
    assert reduction.call_count == (1 if group.size() > 1 else 0)
    return metrics


def agree(metrics: LayerMetrics, expected: dict[str, Any]) -> None:
    assert metrics.drop_rate > 0
    for name in ("drop_rate", "load_max_over_mean"):
        assert getattr(metrics, name) == pytest.approx(expected[name], rel=1e-14), name
    assert list(metrics.load) == pytest.approx(expected["load"], rel=1e-14)
    for name in ("aux_loss", "gate_entropy", "max1_over_max2", "max2_over_max3"):
        assert getattr(metrics, name) == pytest.approx(expected[name], rel=2e-6, nan_ok=True), name


@every(
    "options",
    [
        {},
        {"params_dtype": torch.float32},
        {"moe_router_logit_norm_scale": 2.0, "moe_nominal_capacity_factor": 1.0},
        {"moe_expert_capacity_factor": 0.75},
        {"moe_expert_capacity_factor": 0.75, "moe_token_drop_policy": "position"},
        {"moe_expert_capacity_factor": 0.75, "moe_pad_expert_input_to_capacity": True},
        {"moe_router_topk": 3},
        {"num_moe_experts": 3, "moe_nominal_capacity_factor": 0.5},
        {"moe_router_logit_norm_scale": None, "moe_nominal_capacity_factor": 0.9},
    ],
    ids=lambda options: "-".join(map(str, options.values())) or "default",
)
@on_ranks(1)
def test_one_rank(options: dict[str, Any]) -> None:
    with groups():
        config = configuration(**options)
        everywhere = torch.arange(LENGTH)
        agree(
            observed(Layout(), config),
            token_by_token(config, [[tokens_at(index, everywhere)] for index in range(MICRO_BATCHES)]),
        )


def over_ranks(layout: Layout) -> list[list[list[Token]]]:
    """The micro-batches with each rank's tokens apart."""
    pieces = torch.arange(LENGTH).chunk(2 * layout.cp)
    contexts = [
        torch.cat([pieces[rank], pieces[2 * layout.cp - 1 - rank]]).sort().values for rank in range(layout.cp)
    ]
    parts = [positions for context in contexts for positions in context.chunk(layout.tp)]
    return [[tokens_at(index, part) for part in parts] for index in range(MICRO_BATCHES)]


@every("form", ["switch", "square"])
@on_ranks(2)
def test_two_ranks(form: str) -> None:
    """Tokens over tensor- or context-parallel ranks, micro-batches over data-parallel ranks."""
    for layout in (Layout(tp=2), Layout(cp=2), Layout()):
        with groups(layout):
            config = configuration(layout, moe_aux_loss_form=form)
            expected = token_by_token(config, over_ranks(layout))
            metrics = observed(layout, config)
            if form == "square":
                assert 0 < metrics.aux_loss < 0.1
                expected["aux_loss"] = metrics.aux_loss
            agree(metrics, expected)


@on_ranks(1)
def test_the_squared_loss_is_reported_without_its_coefficient() -> None:
    with groups():
        metrics = observed(Layout(), configuration(moe_aux_loss_form="square", moe_aux_loss_coeff=7.0))
        config = configuration()
        values = []
        for index in range(MICRO_BATCHES):
            gates = [gate_of(token, config)[0] for token in tokens_at(index, torch.arange(LENGTH))]
            values.append(sum((1 / 8 - sum(column) / len(gates)) ** 2 for column in zip(*gates, strict=True)))
        assert metrics.aux_loss == pytest.approx(sum(values) / MICRO_BATCHES, rel=1e-6)


@on_ranks(1)
def test_taking_forgets() -> None:
    with groups():
        router = make_router(configuration())
        router(micro_batch(0))
        assert router.statistics.take(CPU)[7:].sum() == 2 * LENGTH * BATCH
        assert not router.statistics.take(CPU).any()


@on_ranks(1)
def test_evaluation_and_absent_telemetry_observe_nothing() -> None:
    with groups():
        silent = make_router(configuration(moe_router_telemetry=False))
        silent(micro_batch(0).requires_grad_())
        router = make_router(configuration()).eval()
        router(micro_batch(0).requires_grad_())
        router.train()
        with torch.no_grad():
            router(micro_batch(0))
        assert not router.statistics.take(CPU).any()
        assert not silent.statistics.take(CPU)[2:].any()


@on_ranks(1)
def test_it_is_observed_without_an_auxiliary_loss_too() -> None:
    with groups():
        router = make_router(configuration(moe_router_load_balancing_type="none", moe_aux_loss_coeff=0.0))
        router(micro_batch(0).requires_grad_())
        (
            micro_batches,
            aux_loss,
            *_,
        ) = router.statistics.take(CPU).tolist()
        assert micro_batches == aux_loss == 0
        router(micro_batch(0).requires_grad_())
        assert reduce_statistics([router.statistics], torch.distributed.group.WORLD, CPU)[0].gate_entropy > 1


@every("form", ["switch", "square"])
@on_ranks(1)
def test_the_forward_pass_never_waits_for_the_device(form: str) -> None:
    """Meta tensors have no values: whoever asks for one, as `.item()` does, is caught."""
    with pytest.raises(RuntimeError, match="meta"):
        torch.ones(1, device="meta").item()
    with groups():
        router = make_router(configuration(moe_aux_loss_form=form, moe_z_loss_coeff=0.1)).to("meta")
        probs, _ = router(micro_batch(0).to("meta").requires_grad_())
        probs.sum().backward()
        sums = router.statistics.take(torch.device("meta"))
        assert sums.shape == (7 + 8,) and sums.device.type == "meta"


@on_ranks(1)
def test_the_shape_of_the_gate_is_that_of_evenly_spaced_tokens() -> None:
    """Of 3000 tokens every third: 1000, which the load and the drop rate do not follow."""
    logits = torch.randn(3000, 8, generator=generator("many"), dtype=torch.float64)
    load = torch.arange(8) * 750
    statistics, expected = RouterStatistics(8), RouterStatistics(8)
    assert math.ceil(3000 / GATE_SAMPLE) == 3
    for entry, observed_logits in ((statistics, logits), (expected, logits[::3])):
        entry.observe(load, 5000, gate_shape(observed_logits, observed_logits.softmax(-1).float()))
    group: Any = torch.distributed.group.WORLD
    (found,), (wanted,) = (reduce_statistics([entry], group, CPU) for entry in (statistics, expected))
    assert found == wanted
    assert found.gate_entropy == pytest.approx(
        torch.special.entr(logits.softmax(-1)).sum(-1).mean().item(), rel=0.02
    )


@on_ranks(1)
def test_the_sample_has_all_sequences_of_a_micro_batch() -> None:
    """Sequences of very different gates: each has its share in the sample, whatever the micro-batch's size."""
    for length, batch in ((2048, 2), (1024, 4), (4096, 8), (1000, 3), (8192, 1), (10, 2000), (700, 6)):
        sharp = torch.linspace(0.1, 3.0, batch)
        noise = torch.randn(length, batch, 8, generator=generator("sample"))
        logits = (noise * sharp[:, None]).flatten(0, 1)
        statistics = RouterStatistics(8)
        load = torch.full((8,), length * batch // 4)
        statistics.observe(load, None, gate_shape(logits, logits.softmax(-1), num_sequences=batch))
        sampled, entropy = statistics.take(CPU)[3:5].tolist()
        assert min(length * batch, GATE_SAMPLE) / 2 <= sampled <= GATE_SAMPLE, (length, batch)
        expected = torch.special.entr(logits.double().softmax(-1)).sum(-1).mean().item()
        assert entropy / sampled == pytest.approx(expected, rel=0.04), (length, batch)


def test_the_entropy_of_a_gate_of_large_logits() -> None:
    logits = torch.tensor([[1e6, 1e6 - 1.0, 1e6 - 2.0, 0.0]] * 4)
    statistics = RouterStatistics(4)
    statistics.observe(torch.tensor([4, 4, 0, 0]), None, gate_shape(logits, logits.softmax(-1)))
    sampled, entropy = statistics.take(CPU)[3:5].tolist()
    expected = torch.special.entr(torch.tensor([0.0, -1.0, -2.0, -math.inf]).softmax(-1)).sum().item()
    assert entropy / sampled == pytest.approx(expected, rel=1e-6)


def test_dropped_elsewhere() -> None:
    """A dispatcher that drops over a whole group adds to what the router saw."""
    statistics = RouterStatistics(4)
    statistics.observe_dropped(torch.tensor(3))
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]] * 4)
    statistics.observe(torch.tensor([4, 0, 0, 0]), 4, gate_shape(logits, logits.softmax(-1)))
    assert statistics.take(CPU)[2].item() == 3


def test_names() -> None:
    assert METRICS == (
        "drop_rate", "aux_loss", "load_max_over_mean", "gate_entropy", "max1_over_max2", "max2_over_max3",
    )  # fmt: skip
