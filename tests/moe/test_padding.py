"""Padding takes part in nothing: losses against autograd of their formulas, dropped assignments against a count."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from megatron.core import package_info, parallel_state
from megatron.core.tensor_parallel import checkpoint
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.moe.controller import find_routers
from nemo_skymoe.moe.padding import padding_told
from nemo_skymoe.moe.router import SkyworkRouter
from nemo_skymoe.moe.telemetry import reduce_statistics
from nemo_skymoe.ranks import run_ranks
from tests.cases import every
from tests.moe.worlds import (
    Layout,
    Training,
    configuration,
    context_positions,
    generator,
    groups,
    in_world,
    logged_losses,
    make_router,
    on_ranks,
    relative_errors,
)

LENGTH, BATCH, HIDDEN, EXPERTS, TOPK = 16, 2, 16, 8, 2
SCALE, AUX, Z = 0.7, 3.0, 0.4
MEGATRON_HAS_MASKS = [package_info.MAJOR, package_info.MINOR] >= [0, 16]
HAS_GLOBAL = hasattr(TopKRouter, "_apply_global_aux_loss")
FORMS = ["switch", "square", "seq", *(["global"] if HAS_GLOBAL else [])]
Tell = Callable[[Any, Tensor, Tensor], Any]


def hidden_states() -> Tensor:
    return torch.randn(LENGTH, BATCH, HIDDEN, generator=generator("padded"), dtype=torch.float64)


def upstream() -> Tensor:
    return torch.randn(LENGTH, BATCH, EXPERTS, generator=generator("upstream"), dtype=torch.float64)


def padding(share: float) -> Tensor:
    """[B, S], True at the end of each sequence; unevenly, so that some ranks of a split have none."""
    first = torch.tensor([int(LENGTH * (1 - share)), int(LENGTH * (1 - share / 4))])
    return torch.arange(LENGTH) >= first[:, None]


def told(router: Any, x: Tensor, mask_BS: Tensor) -> Any:
    with padding_told([router], mask_BS):
        return router(x)


def passed_on(router: Any, x: Tensor, mask_BS: Tensor) -> Any:
    """As Megatron does from 0.16: [S, B], this sequence-parallel rank's part."""
    mask_SB = mask_BS.t()
    if router.config.sequence_parallel:
        mask_SB = mask_SB.chunk(router.tp_group.size())[router.tp_group.rank()]
    return router(x, padding_mask=mask_SB)


WAYS: list[Tell] = [told, *([passed_on] if MEGATRON_HAS_MASKS else [])]


def options_of(form: str, per_token: bool) -> dict[str, Any]:
    kinds = {"seq": "seq_aux_loss", "global": "global_aux_loss"}
    return {
        "moe_router_load_balancing_type": kinds.get(form, "aux_loss"),
        "moe_aux_loss_form": "square" if form == "square" else "switch",
        "moe_aux_loss_coeff": AUX,
        "moe_z_loss_coeff": Z,
        "calculate_per_token_loss": per_token,
    }


def router_gradient(
    layout: Layout, form: str, per_token: bool, share: float, tell: Tell
) -> tuple[Tensor, float]:
    """Gradient of the gate's weight summed over the ranks that share the micro-batch, and the loss as it is logged."""
    with groups(layout):
        MoEAuxLossAutoScaler.main_loss_backward_scale = torch.tensor(SCALE)
        router = make_router(configuration(layout, **options_of(form, per_token)))
        positions = context_positions()
        here = positions.chunk(layout.tp)[parallel_state.get_tensor_model_parallel_rank()]
        probs, _ = tell(router, hidden_states()[here].requires_grad_(), padding(share)[:, positions])
        valid = ~padding(share).t()[here].reshape(-1, 1)
        main = (probs * upstream()[here].reshape(-1, EXPERTS) * valid).sum()
        (gradient,) = torch.autograd.grad(main, router.weight)
        torch.distributed.all_reduce(gradient)
        (aux,) = (values for name, values in logged_losses().items() if name != "z_loss")
        logged = aux[0].clone()
        torch.distributed.all_reduce(logged)
        return gradient, logged.item()


def gradient_of_the_formula(form: str, per_token: bool, share: float) -> tuple[Tensor, float]:
    """Written down from the report's and Megatron's formulas, over the tokens that are no padding."""
    router = make_router(configuration())
    weight = router.weight.detach().clone().requires_grad_()
    valid = ~padding(share).t().reshape(-1)
    raw = (hidden_states().reshape(-1, HIDDEN) @ weight.t())[valid]
    gate = ((raw - raw.mean(-1, keepdim=True)) / raw.std(-1, keepdim=True)).softmax(-1)
    chosen = torch.zeros_like(gate).scatter(1, gate.topk(TOPK).indices, 1.0)
    main = (
        gate * chosen / (gate * chosen).sum(-1, keepdim=True) * upstream().reshape(-1, EXPERTS)[valid]
    ).sum()
    count = gate.shape[0]
    if form == "square":
        aux = (1 / EXPERTS - gate.mean(0)).square().sum()
    elif form == "seq":
        # Megatron's mean over the sequences, each over their mean length.
        sequence = torch.arange(BATCH).repeat(LENGTH)[valid]
        of = [sequence == number for number in range(BATCH)]
        mean = count / BATCH
        aux = sum(EXPERTS * (chosen[s].sum(0) * gate[s].sum(0)).sum() for s in of) / (TOPK * mean**2) / BATCH
    else:
        aux = EXPERTS * (chosen.sum(0) / (TOPK * count) * gate.mean(0)).sum()
    penalties = AUX * aux + Z * raw.logsumexp(-1).square().mean()
    loss = main + SCALE * penalties * (count if per_token else 1)
    return torch.autograd.grad(loss, weight)[0], float(aux)


CASES = [(form, per_token, share) for form in FORMS for per_token in (False, True) for share in (0.0, 0.75)]


def all_gradients(layouts: list[Layout]) -> dict[Any, Any]:
    return {
        (str(layout), *case, tell.__name__): router_gradient(layout, *case, tell)
        for layout in layouts
        for case in CASES
        for tell in WAYS
    }


def expected_gradients() -> dict[Any, Any]:
    with groups():
        return {case: gradient_of_the_formula(*case) for case in CASES}


@every(
    "layouts",
    [[Layout()], [Layout(tp=2), Layout(cp=2)], [Layout(tp=2, cp=2)]],
    ids=["one rank", "two ranks", "four ranks"],
)
def test_gradients_are_those_of_the_tokens_that_are_no_padding(layouts: list[Layout]) -> None:
    """Every form of auxiliary loss with the z-loss, averaged over micro-batches or over tokens."""
    expected = run_ranks(in_world, 1, expected_gradients)[0]
    world = layouts[0].tp * layouts[0].cp
    for (layout, *case, way), (found, logged) in run_ranks(in_world, world, all_gradients, layouts)[
        0
    ].items():
        gradient, loss = expected[tuple(case)]
        error = (found - gradient).norm() / gradient.norm()
        assert error < 1e-6, f"{layout} {case} {way}: {error}"  # Megatron's softmax is float32
        assert logged == pytest.approx(loss, rel=1e-5), f"{layout} {case} {way}"


@on_ranks(1)
def test_nothing_but_padding_has_no_loss_and_no_drop_rate() -> None:
    for form in FORMS:
        with groups():
            router = make_router(configuration(**options_of(form, per_token=False)))
            probs, _ = told(
                router, hidden_states().requires_grad_(), torch.ones(BATCH, LENGTH, dtype=torch.bool)
            )
            (gradient,) = torch.autograd.grad(0 * probs.sum(), router.weight)
            assert not gradient.any(), form
            group: Any = torch.distributed.group.WORLD
            (metrics,) = reduce_statistics([router.statistics], group, torch.device("cpu"))
            assert not any(metrics.load) and metrics.drop_rate != metrics.drop_rate


def drop_counts(layout: Layout, share: float, tell: Tell, options: dict[str, Any]) -> tuple[int, int, float]:
    """Valid assignments, those of them without a place, both counted in the router's output; and its telemetry."""
    with groups(layout):
        router = make_router(configuration(layout, **options))
        positions = context_positions()
        here = positions.chunk(layout.tp)[parallel_state.get_tensor_model_parallel_rank()]
        x = hidden_states()[here]
        probs, _ = tell(router, x.clone().requires_grad_(), padding(share)[:, positions])
        raw = x.reshape(-1, HIDDEN) @ router.weight.t()
        assigned = torch.zeros(raw.shape, dtype=torch.bool).scatter(1, raw.topk(TOPK).indices, True)
        assigned &= ~padding(share).t()[here].reshape(-1, 1)
        counts = torch.tensor([assigned.sum(), (assigned & (probs == 0)).sum()])
        torch.distributed.all_reduce(counts)
        group: Any = torch.distributed.group.WORLD
        (metrics,) = reduce_statistics([router.statistics], group, torch.device("cpu"))
        return int(counts[0]), int(counts[1]), metrics.drop_rate


def check_drop_counts(layout: Layout) -> None:
    for share in (0.0, 0.5, 0.9):
        for tell in WAYS:
            for options in (
                {"moe_expert_capacity_factor": 0.5},
                {"moe_expert_capacity_factor": 0.5, "moe_token_drop_policy": "position"},
                {"moe_expert_capacity_factor": 0.5, "moe_pad_expert_input_to_capacity": True},
            ):
                assigned, dropped, rate = drop_counts(layout, share, tell, options)
                assert dropped > 0 and rate == dropped / assigned, (layout, share, options)


def test_the_drop_rate_is_what_was_really_dropped_of_what_counts() -> None:
    """Padding has weights and takes places, so the counts of valid tokens alone do not say what was dropped."""
    for size, layouts in {1: [Layout()], 2: [Layout(tp=2), Layout(cp=2)]}.items():
        for layout in layouts:
            run_ranks(in_world, size, check_drop_counts, layout)


def padded_training(layout: Layout, options: dict[str, Any]) -> tuple[list[float], dict[str, Tensor]]:
    """Drop rates of the layers and the gradients."""
    with groups(layout):
        training = Training(layout, **options, moe_expert_capacity_factor=0.75, moe_z_loss_coeff=Z)
        routers = find_routers(training.chunks).values()
        with padding_told(routers, padding(0.75)):
            training.run()
        group: Any = torch.distributed.group.WORLD
        metrics = reduce_statistics([r.statistics for r in routers], group, torch.device("cpu"))
        return [layer.drop_rate for layer in metrics], training.gradients()


def test_expert_data_parallelism_under_padding_is_one_rank() -> None:
    """Where the dispatcher drops over the whole group's tokens, and where every rank holds all of them."""
    (one, gradients) = run_ranks(in_world, 1, padded_training, Layout(), {})[0]
    assert min(one) > 0
    for options in ({"moe_capacity_scope": "edp"}, {"sequence_parallel": False}):
        for rates, found in run_ranks(
            in_world, 2, padded_training, Layout(tp=2, ep=2), {"moe_edp": True, **options}
        ):
            assert rates == one, options
            assert max(relative_errors(found, gradients).values()) <= 1e-10, options


@on_ranks(1)
def test_the_virtual_drop_rate_is_that_of_the_tokens_that_are_no_padding() -> None:
    """A padded micro-batch is the micro-batch of its other tokens, in every metric."""
    with groups():
        metrics = []
        for padded in (True, False):
            router = make_router(configuration(moe_nominal_capacity_factor=0.9))
            x = hidden_states().requires_grad_()
            mask = (torch.arange(LENGTH) >= LENGTH // 2).expand(BATCH, LENGTH)
            told(router, x, mask) if padded else router(x[: LENGTH // 2])
            group: Any = torch.distributed.group.WORLD
            metrics += reduce_statistics([router.statistics], group, torch.device("cpu"))
        assert metrics[0].drop_rate > 0
        for name, value in vars(metrics[0]).items():
            assert value == pytest.approx(getattr(metrics[1], name), rel=1e-6), name


def seen_through(router: Any, recomputed: bool) -> Tensor:
    """The load after two micro-batches of other padding, both forward passes before the first backward pass."""
    outputs = []
    for share in (0.25, 0.75):
        x = hidden_states().requires_grad_()
        with padding_told([router], padding(share)):
            run: Any = functools.partial(checkpoint, lambda x: router(x)[0], False) if recomputed else router
            result = run(x)
        outputs.append(result if recomputed else result[0])
    for output in outputs:
        output.sum().backward()
    return router.statistics.take(torch.device("cpu"))


@on_ranks(1)
def test_recomputation_sees_the_padding_of_its_own_micro_batch() -> None:
    with groups():
        plain, again = (
            seen_through(make_router(configuration()), recomputed) for recomputed in (False, True)
        )
        assert torch.equal(plain, again)
        assert plain[7:].sum() == TOPK * sum(int((~padding(share)).sum()) for share in (0.25, 0.75))


@on_ranks(1)
def test_a_mask_of_another_shape() -> None:
    with groups():
        router = make_router(configuration())
        with pytest.raises(
            ConfigurationError, match=r"mask told to MoE layer 1 is \[2, 8\].*expected .* \[2, 16\]"
        ):
            told(router, hidden_states().requires_grad_(), torch.zeros(2, 8, dtype=torch.bool))


@pytest.mark.skipif(not MEGATRON_HAS_MASKS, reason="Megatron 0.16 brought padding masks")
@on_ranks(1)
def test_losses_under_padding_are_the_stock_routers() -> None:
    for form in ("switch", "seq", "global"):
        for per_token in (False, True):
            if form == "seq" and per_token:
                continue  # Megatron 0.16 divides it by the micro-batch's size
            gradients = []
            for router_class in (SkyworkRouter, TopKRouter):
                with groups():
                    MoEAuxLossAutoScaler.main_loss_backward_scale = torch.tensor(SCALE)
                    options = {**options_of(form, per_token), "moe_router_logit_norm_scale": None}
                    router = make_router(configuration(**options, moe_router_dtype="fp64"), router_class)
                    probs, _ = passed_on(router, hidden_states().requires_grad_(), padding(0.75))
                    gradients += torch.autograd.grad((probs * upstream().flatten(0, 1)).sum(), router.weight)
            ours, stock = gradients
            assert (ours - stock).norm() <= 1e-6 * stock.norm(), (form, per_token)
