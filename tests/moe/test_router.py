"""SkyworkRouter on one rank, against the stock router and against the report's formulas."""

from typing import Any

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.moe.router import SkyworkRouter
from tests.cases import every
from tests.moe.worlds import (
    configuration,
    forget_logged_losses,
    generator,
    groups,
    logged_losses,
    make_router,
    on_ranks,
)

SEQUENCE, BATCH, HIDDEN, EXPERTS = 24, 2, 16, 8
HAS_GLOBAL = hasattr(TopKRouter, "_apply_global_aux_loss")
TYPES = ["aux_loss", "seq_aux_loss", *(["global_aux_loss"] if HAS_GLOBAL else [])]


def hidden_states(dtype: torch.dtype = torch.float64, sequence: int = SEQUENCE) -> Tensor:
    noise = torch.randn(sequence, BATCH, HIDDEN, generator=generator("hidden"), dtype=torch.float64)
    return noise.to(dtype).requires_grad_()


def router_of(router_class: type[TopKRouter] = SkyworkRouter, **options: Any) -> Any:
    values = {"params_dtype": torch.float32, "moe_router_dtype": "fp32", **options}
    return make_router(configuration(**values), router_class)


def pass_through(router: Any, x: Tensor, scale: float = 0.7) -> tuple[Tensor, ...]:
    """Weights, map and the gradients of input and weight matrix under a random loss; auxiliary losses times `scale`."""
    MoEAuxLossAutoScaler.main_loss_backward_scale = torch.tensor(scale)
    probs, routing_map = router(x)
    upstream = torch.randn(probs.shape, generator=generator("upstream"), dtype=torch.float64)
    gradients = torch.autograd.grad((probs * upstream.to(probs.dtype)).sum(), [x, router.weight])
    return probs, routing_map, *gradients


def normalized(x: Tensor, router: Any, scale: float = 1.0) -> Tensor:
    """The report's gate in the test's own words: [tokens, experts]."""
    z = x.reshape(-1, HIDDEN) @ router.weight.t()
    return scale * (z - z.mean(-1, keepdim=True)) / z.std(-1, keepdim=True)


@every("dtype", [torch.float32, torch.bfloat16])
@every(
    "options",
    [
        {},
        {"moe_router_topk": 3, "moe_z_loss_coeff": 1e-2},
        {"moe_expert_capacity_factor": 0.75},
        {"moe_expert_capacity_factor": 0.75, "moe_token_drop_policy": "position"},
        {"moe_expert_capacity_factor": 0.75, "moe_pad_expert_input_to_capacity": True},
        {"moe_router_topk": 1, "moe_router_pre_softmax": True},
        {"moe_router_load_balancing_type": "none", "moe_aux_loss_coeff": 0.0},
        *({"moe_router_load_balancing_type": kind} for kind in TYPES[1:]),
        {"moe_router_load_balancing_type": TYPES[:2], "moe_aux_loss_coeff": [0.1, 0.2]},
    ],
    ids=lambda options: "-".join(map(str, options.values())) or "default",
)
@on_ranks(1)
def test_without_normalisation_it_is_the_stock_router_to_the_bit(
    dtype: torch.dtype, options: dict[str, Any]
) -> None:
    with groups():
        options = {"params_dtype": dtype, "moe_router_logit_norm_scale": None, **options}
        ours, stock = router_of(**options), router_of(TopKRouter, **options)
        assert torch.equal(ours.weight, stock.weight)
        for training in (True, False):
            ours.train(training)
            stock.train(training)
            x = hidden_states(dtype)
            names = ("weights", "map", "input gradient", "weight gradient")
            for name, a, b in zip(names, pass_through(ours, x), pass_through(stock, x), strict=True):
                assert a.dtype == b.dtype and torch.equal(a, b), f"{name}, training={training}"


@on_ranks(1)
def test_the_weight_follows_params_dtype_and_the_maths_is_in_float32() -> None:
    with groups():
        router = router_of(params_dtype=torch.bfloat16, moe_router_dtype=None)
        assert router.weight.dtype == torch.bfloat16
        probs, _, *gradients = pass_through(router, hidden_states(torch.bfloat16))
        assert probs.dtype == torch.float32
        assert [g.dtype for g in gradients] == [torch.bfloat16, torch.bfloat16]


@every("training", [True, False])
@every("scale", [0.5, 1.0, 2.0])
@on_ranks(1)
def test_weights_follow_eq_2_of_normalised_gates(scale: float, training: bool) -> None:
    with groups():
        router = router_of(params_dtype=torch.float64, moe_router_logit_norm_scale=scale).train(training)
        x = hidden_states()
        gate = normalized(x, router, scale).softmax(-1)
        top = gate.topk(2)
        expected = torch.zeros_like(gate).scatter(
            1, top.indices, top.values / top.values.sum(-1, keepdim=True)
        )
        probs, routing_map = router(x)
        torch.testing.assert_close(probs, expected, rtol=1e-6, atol=0)
        assert torch.equal(routing_map, expected > 0)


@on_ranks(1)
def test_auxiliary_scores_are_the_normalised_gate() -> None:
    """Seen by the logged loss: Megatron's form at the coefficient's strength, on our gate."""
    with groups():
        router = router_of(params_dtype=torch.float64)
        x = hidden_states()
        gate = normalized(x, router).softmax(-1)
        load = torch.zeros(EXPERTS).scatter_add_(
            0, gate.topk(2).indices.flatten(), torch.ones(gate.shape[0] * 2)
        )
        expected = EXPERTS * (load / load.sum() * gate.mean(0)).sum()
        router(x)
        logged = logged_losses()["load_balancing_loss"][0]
        assert logged.item() == pytest.approx(expected.item(), rel=1e-6)


@every("norm_scale", [None, 1.0])
@every("form", ["switch", "square"])
@on_ranks(1)
def test_gradients_are_autograds_of_the_formulas(form: str, norm_scale: float | None) -> None:
    """Combine weights, auxiliary loss and the z-loss of the raw logits in one loss, written down again."""
    with groups():
        options = {"moe_aux_loss_form": form, "moe_z_loss_coeff": 0.4, "moe_aux_loss_coeff": 3.0}
        router = router_of(params_dtype=torch.float64, moe_router_logit_norm_scale=norm_scale, **options)
        x = hidden_states()
        probs, routing_map, *found = pass_through(router, x)

        raw = x.reshape(-1, HIDDEN) @ router.weight.t()
        gate = (raw if norm_scale is None else normalized(x, router)).softmax(-1)
        kept = gate * routing_map
        upstream = torch.randn(probs.shape, generator=generator("upstream"), dtype=torch.float64)
        loss = (kept / kept.sum(-1, keepdim=True) * upstream).sum()
        if form == "switch":
            share = routing_map.sum(0) / routing_map.sum()
            loss = loss + 0.7 * 3.0 * EXPERTS * (share * gate.mean(0)).sum()
        else:
            loss = loss + 0.7 * 3.0 * (1 / EXPERTS - gate.mean(0)).square().sum()
        loss = loss + 0.7 * 0.4 * raw.logsumexp(-1).square().mean()
        expected = torch.autograd.grad(loss, [x, router.weight])
        for a, b in zip(found, expected, strict=True):
            assert (a - b).norm() <= 1e-6 * b.norm()  # Megatron's softmax is float32


@on_ranks(1)
def test_the_z_loss_does_not_see_the_normalised_logits() -> None:
    """Of those it would be nearly constant: scaling the weight matrix must change it."""
    with groups():
        router = router_of(
            moe_z_loss_coeff=1.0, moe_router_load_balancing_type="none", moe_aux_loss_coeff=0.0
        )
        values = []
        for factor in (1.0, 3.0):
            router.weight.data.mul_(factor)
            forget_logged_losses()
            router(hidden_states(torch.float32))
            values.append(logged_losses()["z_loss"][0].item())
        assert values[1] > 2 * values[0]


@on_ranks(1)
def test_equal_logits_are_assigned_by_token_index_also_in_the_auxiliary_loss() -> None:
    """Megatron takes the loss's map from the scores, where such a token goes to the first experts."""
    with groups():
        router = router_of(params_dtype=torch.float64, moe_router_logit_norm_eps=1e-6)
        router.weight.data.zero_()
        probs, routing_map = router(hidden_states())
        tokens = SEQUENCE * BATCH
        expected = torch.zeros(tokens, EXPERTS, dtype=torch.bool)
        for token in range(tokens):
            expected[token, [2 * token % EXPERTS, (2 * token + 1) % EXPERTS]] = True
        assert torch.equal(routing_map, expected)
        assert torch.equal(probs, 0.5 * expected)
        sums = router.statistics.take(torch.device("cpu"))
        assert sums[7:].tolist() == [tokens * 2 / EXPERTS] * EXPERTS
        (gradient,) = torch.autograd.grad(router(hidden_states())[0].square().sum(), router.weight)
        assert torch.isfinite(gradient).all()


@every("policy", ["probs", "position"])
@on_ranks(1)
def test_dropping_uses_the_assignment_of_equal_logits(policy: str) -> None:
    with groups():
        router = router_of(moe_expert_capacity_factor=1.0, moe_token_drop_policy=policy)
        router.weight.data.zero_()
        _, routing_map = router(hidden_states(torch.float32))
        assert routing_map.sum().item() == 2 * SEQUENCE * BATCH
        assert router.statistics.take(torch.device("cpu"))[2].item() == 0


@on_ranks(1)
def test_top_1_leaves_equal_scores_to_megatron() -> None:
    """Who has to choose among scores, not logits; the auxiliary loss and the telemetry see what it chose."""
    with groups():
        router = router_of(moe_router_topk=1, moe_router_pre_softmax=True)
        router.weight.data.zero_()
        _, routing_map = router(hidden_states(torch.float32))
        assert torch.equal(router.statistics.take(torch.device("cpu"))[7:], routing_map.sum(0).double())


@on_ranks(1)
def test_random_logits_for_benchmarks_are_not_taken_for_the_gate() -> None:
    with groups():
        router = router_of(moe_router_force_load_balancing=True)
        router.weight.data.zero_()
        _, routing_map = router(hidden_states(torch.float32))
        load = router.statistics.take(torch.device("cpu"))[7:]
        assert torch.equal(load, routing_map.sum(0).double())


@on_ranks(1)
def test_no_tokens() -> None:
    for form in ("switch", "square"):
        with groups():
            router = router_of(moe_z_loss_coeff=0.1, moe_aux_loss_form=form, moe_expert_capacity_factor=1.0)
            x = hidden_states(torch.float32, sequence=0)
            probs, routing_map, *gradients = pass_through(router, x)
            assert probs.shape == routing_map.shape == (0, EXPERTS)
            assert torch.equal(gradients[1], torch.zeros_like(gradients[1]))
            assert not router.statistics.take(torch.device("cpu"))[2:].any()
            assert not any(values.isnan().any() for values in logged_losses().values())


@every("form", ["switch", "square"])
@on_ranks(1)
def test_one_token(form: str) -> None:
    with groups():
        router = router_of(moe_z_loss_coeff=0.1, moe_aux_loss_form=form, moe_expert_capacity_factor=1.0)
        probs, routing_map, *gradients = pass_through(router, hidden_states(torch.float32)[:1, :1])
        assert routing_map.sum() == 2 and probs.sum().item() == pytest.approx(1.0)
        assert all(torch.isfinite(g).all() for g in gradients)


@on_ranks(1)
def test_as_many_experts_a_token_as_there_are() -> None:
    with groups():
        router = router_of(params_dtype=torch.float64, moe_router_topk=EXPERTS)
        x = hidden_states()
        probs, routing_map = router(x)
        assert routing_map.all()
        torch.testing.assert_close(probs, normalized(x, router).softmax(-1), rtol=1e-6, atol=0)


@on_ranks(1)
def test_one_expert() -> None:
    """Which the options refuse, for nothing is learned; no number goes wrong."""
    with groups():
        config = configuration(moe_router_topk=1, moe_router_pre_softmax=True, params_dtype=torch.float32)
        config.num_moe_experts = 1
        router = make_router(config)
        probs, routing_map, *gradients = pass_through(router, hidden_states(torch.float32))
        assert routing_map.all() and torch.equal(probs, torch.ones_like(probs))
        assert all(torch.isfinite(g).all() for g in gradients)


@on_ranks(1)
def test_all_tokens_to_the_same_experts() -> None:
    with groups():
        router = router_of(moe_expert_capacity_factor=1.0)
        x = hidden_states(torch.float32)
        with torch.no_grad():
            x.copy_(x[:1, :1].expand_as(x))
        pass_through(router, x)
        dropped = router.statistics.take(torch.device("cpu"))[2].item()
        tokens = SEQUENCE * BATCH
        assert dropped == 2 * (tokens - 2 * tokens / EXPERTS)


@on_ranks(1)
def test_a_vanishing_coefficient_keeps_the_layer_in_megatrons_loss_log() -> None:
    with groups():
        router = router_of(moe_adaptive_aux_loss=True)
        router.aux_loss_coefficient = 0.0
        router(hidden_states(torch.float32))
        logged = logged_losses()["load_balancing_loss"][0].item()
        assert logged == pytest.approx(1.0, abs=0.5)
        assert 0 < router.get_aux_loss_coeff("aux_loss") <= 1e-12


@on_ranks(1)
def test_global_auxiliary_loss_is_megatrons_where_it_has_one() -> None:
    with groups():
        options: dict[str, Any] = {"moe_router_load_balancing_type": "global_aux_loss"}
        if not HAS_GLOBAL:
            with pytest.raises(ConfigurationError, match=r"has no global_aux_loss: it came with 0\.15"):
                router_of(**options)
            return
        # Over one micro-batch on one rank, the whole batch is the micro-batch.
        ours, local = router_of(**options), router_of(moe_router_load_balancing_type="aux_loss")
        for a, b in zip(*(pass_through(r, hidden_states(torch.float32)) for r in (ours, local)), strict=True):
            assert torch.equal(a, b)
        weak = pass_through(router_of(**options, moe_aux_loss_coeff=1e-9), hidden_states(torch.float32))
        assert (pass_through(ours, hidden_states(torch.float32))[3] - weak[3]).norm() > 0.01


@on_ranks(1)
def test_it_needs_its_options() -> None:
    from megatron.core.transformer import TransformerConfig

    with groups():
        config: Any = TransformerConfig(
            num_layers=1,
            hidden_size=16,
            num_attention_heads=4,
            num_moe_experts=8,
            add_bias_linear=False,
            use_cpu_initialization=True,
        )
        with pytest.raises(
            ConfigurationError, match="configuration with SkyworkOptions, got TransformerConfig"
        ):
            make_router(config)
