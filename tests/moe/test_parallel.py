"""The same micro-batches on n ranks and on one: every parameter's gradient, and every token's experts."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import schedules
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from nemo_skymoe.moe import aux_loss
from nemo_skymoe.moe.gradients import ScaleGradient
from nemo_skymoe.moe.router import SkyworkRouter
from nemo_skymoe.patches import context_parallel_aux_loss
from nemo_skymoe.ranks import run_ranks
from tests.cases import every
from tests.moe.worlds import (
    BATCH,
    LENGTH,
    Layout,
    Training,
    configuration,
    context_positions,
    generator,
    groups,
    in_world,
    make_router,
    relative_errors,
)

MICRO_BATCHES = 2
PER_TOKEN = {"calculate_per_token_loss": True}
SQUARE = {"moe_aux_loss_form": "square", "moe_aux_loss_coeff": 20.0}
Z_LOSS = {"moe_z_loss_coeff": 0.3}
GATES = {"moe_router_two_layer_gate": True, "moe_router_gate_bias": True}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
SELECTIVE = {"recompute_granularity": "selective", "recompute_modules": ["moe"]}
OPTIONS: dict[str, dict[str, Any]] = {
    "switch": Z_LOSS,
    "square": {**Z_LOSS, **SQUARE},
    "per token": {**Z_LOSS, **PER_TOKEN},
    "per token, square": {**PER_TOKEN, **SQUARE},
    "per token, not normalised": {**Z_LOSS, **PER_TOKEN, "moe_router_logit_norm_scale": None},
    "other gates": {**Z_LOSS, **GATES},
    "full recomputation": {**Z_LOSS, **SQUARE, **FULL},
    "selective recomputation": {**Z_LOSS, **SELECTIVE},
}
LAYOUTS = {
    1: [Layout()],
    2: [Layout(tp=2, ep=2), Layout(cp=2), Layout(ep=2), Layout(pp=2, vpp=2)],
    4: [Layout(tp=2, cp=2, ep=2), Layout(tp=2, ep=2, pp=2, vpp=2), Layout(tp=2, ep=4)],
}
# Four ranks on few cores are slow: what two ranks cannot show.
FEW = ("square", "per token", "other gates")
# Recomputation must not change the result, so its reference is the run without.
REFERENCE = {"full recomputation": "square", "selective recomputation": "switch"}

Gradients = dict[str, Tensor]


def gradients(layout: Layout, options: dict[str, Any]) -> Gradients:
    with groups(layout):
        training = Training(layout, MICRO_BATCHES, num_layers=4, **options)
        training.run()
        return training.gradients()


def all_gradients(world_size: int) -> dict[tuple[str, str], Gradients]:
    return {
        (str(layout), name): gradients(layout, options)
        for layout in LAYOUTS[world_size]
        for name, options in OPTIONS.items()
        if world_size < 4 or name in FEW
    }


@functools.cache
def results(world_size: int) -> dict[tuple[str, str], Gradients]:
    """Every case of a world size, from one world."""
    return run_ranks(in_world, world_size, all_gradients, world_size)[0]


def one_rank(name: str) -> Gradients:
    return results(1)["dp", REFERENCE.get(name, name)]


@every(
    ("world_size", "layout", "name"),
    [
        (size, str(layout), name)
        for size, layouts in LAYOUTS.items()
        for layout in layouts
        for name in OPTIONS
        if size < 4 or name in FEW
    ],
)
def test_gradients_are_those_of_one_rank(world_size: int, layout: str, name: str) -> None:
    errors = relative_errors(results(world_size)[layout, name], one_rank(name))
    assert len(errors) > 4 * 8
    assert max(errors.values()) <= 1e-10, max(errors.items(), key=lambda item: item[1])


@every("name", ["switch", "square", "per token", "per token, square"])
def test_the_auxiliary_losses_matter_to_that(name: str) -> None:
    """Else the test above could not see their strength."""
    options = {**OPTIONS[name], "moe_aux_loss_coeff": 1e-12, "moe_z_loss_coeff": None}
    without = run_ranks(in_world, 1, gradients, Layout(), options)[0]
    errors = relative_errors(without, one_rank(name))
    assert all(error > 0.01 for parameter, error in errors.items() if "router" in parameter)


# What is taken away, where the gradients then go wrong, and whether the installed Megatron needs it.
MUTATIONS: dict[str, tuple[Layout, str]] = {
    "the per-token correction of the auxiliary loss": (Layout(tp=2, ep=2), "per token, square"),
    "the per-token correction of the z-loss": (Layout(cp=2), "per token"),
    "the mean gate over the group": (Layout(tp=2, ep=2), "square"),
    "the sequence-parallel tag of the gate": (Layout(tp=2, ep=2), "other gates"),
    **(
        {"the scale over context ranks": (Layout(cp=2), "switch")}
        if context_parallel_aux_loss.needed()
        else {}
    ),
}


def _ignore_padding(stock: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, without_padding=False, **kwargs: stock(*args, **kwargs)


@contextmanager
def without(mutation: str) -> Iterator[None]:
    patch: Callable[..., Any] = mock.patch.object
    if "of the auxiliary loss" in mutation:
        stock = TopKRouter.attach_and_log_load_balancing_loss
        with patch(SkyworkRouter, stock.__name__, _ignore_padding(stock)):
            yield
    elif "of the z-loss" in mutation:
        with patch(ScaleGradient, "backward", staticmethod(lambda ctx, gradient: (gradient, None))):
            yield
    elif "mean gate" in mutation:
        with patch(aux_loss, "reduce_from_tensor_model_parallel_region", lambda share, group: share * 2):
            yield
    elif "context" in mutation:
        make_router(configuration())  # what applies it
        context_parallel_aux_loss.apply()
        with (
            patch(schedules, "forward_step_calc_loss", schedules.forward_step_calc_loss.__wrapped__),  # pyright: ignore
            patch(context_parallel_aux_loss, "apply", lambda: False),
        ):
            yield
    else:
        yield


def mutated_gradients(mutation: str, layout: Layout, options: dict[str, Any]) -> Gradients:
    with groups(layout), without(mutation):
        training = Training(layout, MICRO_BATCHES, num_layers=4, **options)
        if "tag" in mutation:
            for name, parameter in training.chunks[0].named_parameters():
                if "router" in name:
                    parameter.sequence_parallel = False  # pyright: ignore
        training.run()
        return training.gradients()


@every("mutation", MUTATIONS)
def test_without_a_correction_they_are_not(mutation: str) -> None:
    layout, name = MUTATIONS[mutation]
    found = run_ranks(in_world, 2, mutated_gradients, mutation, layout, OPTIONS[name])[0]
    errors = relative_errors(found, one_rank(name))
    assert max(error for parameter, error in errors.items() if "router" in parameter) > 1e-3


def routes(layout: Layout, checkpointed: bool = False) -> Tensor:
    """[sequence, batch, experts] of the tokens that this rank has: -1 elsewhere, else whether the expert was chosen.

    Half of the tokens are zero, so that all their logits are equal.
    """
    with groups(layout):
        router = make_router(configuration(layout))
        x = torch.randn(LENGTH, BATCH, 16, generator=generator("routes"), dtype=torch.float64)
        x[:, :, :] *= (torch.arange(LENGTH) % 2)[:, None, None]
        positions = context_positions().chunk(layout.tp)[parallel_state.get_tensor_model_parallel_rank()]
        here = x[positions].requires_grad_()
        if checkpointed:
            from megatron.core.tensor_parallel import checkpoint

            seen: list[Tensor] = []
            router.register_forward_hook(lambda module, inputs, output: seen.append(output[1]))
            probs: Any = checkpoint(lambda x: router(x)[0], False, here)
            probs.sum().backward()
            first, routing_map = seen
            assert torch.equal(first, routing_map)
        else:
            routing_map = router(here)[1]
        whole = torch.full((LENGTH, BATCH, 8), -1.0)
        whole[positions] = routing_map.view(len(positions), BATCH, 8).float()
        return whole


def all_routes(layouts: list[Layout]) -> list[Tensor]:
    whole = []
    for layout in layouts:
        mine = routes(layout)
        torch.distributed.all_reduce(mine, torch.distributed.ReduceOp.MAX)
        whole.append(mine)
    return whole


def test_equal_logits_go_to_the_same_experts_in_every_layout() -> None:
    (one,), (recomputed,) = (
        run_ranks(in_world, 1, all_routes, [Layout()])[0],
        run_ranks(in_world, 1, routes, Layout(), True),
    )
    expected = torch.zeros(LENGTH, BATCH, 8)
    for position in range(0, LENGTH, 2):
        for sequence in range(BATCH):
            token = position * BATCH + sequence
            expected[position, sequence, [2 * token % 8, (2 * token + 1) % 8]] = 1
    assert torch.equal(one[::2], expected[::2])
    assert torch.equal(recomputed, one)
    for size in (2, 4):
        layouts = [Layout(tp=size), Layout(cp=size), *([Layout(tp=2, cp=2)] if size == 4 else [])]
        for layout, found in zip(layouts, run_ranks(in_world, size, all_routes, layouts)[0], strict=True):
            assert torch.equal(found, one), layout
