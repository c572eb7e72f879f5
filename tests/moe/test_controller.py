"""The adaptive coefficients in training, against eq. (7) to (9) on drop rates counted from the routing itself."""

import functools
import logging
import math
from collections import defaultdict
from typing import Any
from unittest import mock

import pytest
import torch
from megatron.core import parallel_state
from worlds import BATCH, LENGTH, Layout, Training, groups, in_world, on_ranks

from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.moe.aux_loss import AdaptiveAuxLossCoefficients
from nemo_skymoe.moe.controller import AuxLossController
from nemo_skymoe.ranks import run_ranks

STEPS, MICRO_BATCHES, LAYERS, TOPK, EXPERTS = 4, 4, 4, 2, 8
# Estimates on both sides of the maximum, and coefficients that move within a few steps.
ADAPTIVE = {"moe_adaptive_aux_loss": True, "moe_adaptive_aux_loss_smoothing": 0.8}
DROPPING = {"moe_expert_capacity_factor": 1.25, "moe_adaptive_aux_loss_maximum": 0.0165}
DROPLESS = {"moe_nominal_capacity_factor": 1.25, "moe_adaptive_aux_loss_maximum": 0.0165}


class Optimizer:
    """Steps nowhere: the weights stay, so that every layout and every restart sees the same routing."""

    succeeds = True

    def step(self) -> tuple[bool, float, int]:
        return self.succeeds, 0.0, 0


class Adaptive:
    """A model in training with its controller, and the test's own count of what its routers did."""

    def __init__(self, layout: Layout | None = None, **options: Any) -> None:
        layout = layout or Layout()
        options = {"num_layers": LAYERS, **ADAPTIVE, **DROPPING, **options}
        self.training = Training(layout, MICRO_BATCHES, **options)
        self.controller = AuxLossController(self.training.chunks)
        self.optimizer: Any = Optimizer()
        self.controller.attach(self.optimizer)
        self.routers = {
            module.layer_number: module
            for chunk in self.training.chunks
            for module in chunk.modules()
            if hasattr(module, "aux_loss_coefficient")
        }
        self.seen: dict[int, list[torch.Tensor]] = defaultdict(list)
        self.in_force: dict[int, list[float]] = defaultdict(list)
        for number, router in self.routers.items():
            router.register_forward_hook(functools.partial(self._watch, number))

    def _watch(self, number: int, router: Any, inputs: Any, output: Any) -> None:
        if torch.is_grad_enabled() and router.training:
            # Kept assignments by their weights: with padding the map holds more.
            self.seen[number].append(output[0].detach() != 0)
            self.in_force[number].append(router.get_aux_loss_coeff("aux_loss"))

    def step(self, number: int) -> dict[int, float]:
        """One optimizer step; the coefficients after it by layer, of the whole model."""
        self.seen.clear()
        self.in_force.clear()
        self.training.run(number)
        self.optimizer.step()
        return self.coefficients()

    def coefficients(self) -> dict[int, float]:
        return self.controller.state_dict()["aux_loss_coefficients"]

    def counted_drop_rates(self) -> dict[int, float]:
        """Of the step just taken: assignments lost to capacity, or that a capacity factor of 1.25 would have lost."""
        factor = self.training.config.moe_expert_capacity_factor
        counts = {}
        for number, maps in self.seen.items():
            routed = sum(TOPK * kept.shape[0] for kept in maps)
            if factor is None:
                capacity = math.ceil(TOPK * maps[0].shape[0] / EXPERTS * 1.25)
                lost = sum(max(0, int(n) - capacity) for kept in maps for n in kept.sum(0))
            else:
                lost = routed - sum(int(kept.sum()) for kept in maps)
            counts[number] = lost, routed
        everyone: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everyone, counts)
        layers = sorted({number for counts in everyone for number in counts})
        sums = {n: [sum(c[n][i] for c in everyone if n in c) for i in (0, 1)] for n in layers}
        return {number: lost / routed for number, (lost, routed) in sums.items()}


def eq_7_to_9(previous: float, drop_rate: float) -> float:
    return 0.8 * previous + (1 - 0.8) * min(0.2 * drop_rate, 0.0165)


def follow(layout: Layout, options: dict[str, Any]) -> dict[str, Any]:
    """A few steps: drop rates as counted, coefficients as the controller has them, by step and layer."""
    with groups(layout):
        adaptive = Adaptive(layout, **options)
        rates, values = [], [adaptive.coefficients()]
        for number in range(STEPS):
            values.append(adaptive.step(number))
            rates.append(adaptive.counted_drop_rates())
            for layer, used in adaptive.in_force.items():
                accumulated = MICRO_BATCHES // parallel_state.get_data_parallel_world_size()
                assert used == [values[-2][layer]] * accumulated, "not constant within the step"
            for layer, metrics in adaptive.controller.metrics.items():
                assert metrics.drop_rate == pytest.approx(rates[-1][layer], rel=1e-14)
            for layer, router in adaptive.routers.items():
                assert router.aux_loss_coefficient == values[-1][layer]
        everyone: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everyone, values)
        assert all(other == values for other in everyone), "not the same bits on every rank"
        return {"rates": rates, "values": values}


LAYOUTS = {
    1: [Layout()],
    2: [Layout(), Layout(ep=2), Layout(tp=2, ep=2), Layout(cp=2), Layout(pp=2), Layout(pp=2, vpp=2)],
    4: [Layout(tp=2, ep=2, pp=2, vpp=2), Layout(ep=2, pp=2)],
}
OPTIONS: dict[str, dict[str, Any]] = {
    "dropping": {},
    "dropless": {**DROPLESS, "moe_expert_capacity_factor": None},
    "padded": {"moe_pad_expert_input_to_capacity": True},
    "full recomputation": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
    "selective recomputation": {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
}


def follow_all(world_size: int) -> dict[tuple[str, str], dict[str, Any]]:
    cases = [(layout, "dropping") for layout in LAYOUTS[world_size]]
    if world_size < 4:  # on all virtual stages of two ranks
        cases += [(LAYOUTS[world_size][-1], name) for name in OPTIONS if name != "dropping"]
    return {(str(layout), name): follow(layout, OPTIONS[name]) for layout, name in cases}


@functools.cache
def trajectories(world_size: int) -> dict[tuple[str, str], dict[str, Any]]:
    """Every case of a world size, from one world."""
    return run_ranks(in_world, world_size, follow_all, world_size, timeout=300)[0]


@pytest.mark.parametrize("world_size", LAYOUTS)
def test_trajectories_follow_the_equations(world_size: int) -> None:
    for case, found in trajectories(world_size).items():
        values = found["values"]
        assert values[0] == dict.fromkeys(range(1, LAYERS + 1), 0.0165)
        for step, rates in enumerate(found["rates"]):
            assert all(rate > 0 for rate in rates.values())
            expected = {layer: eq_7_to_9(values[step][layer], rate) for layer, rate in rates.items()}
            assert values[step + 1] == pytest.approx(expected, rel=1e-14), case
        # Otherwise the test would not tell layers, steps or the two branches of eq. (7) apart.
        for step in range(STEPS):
            assert len(set(found["rates"][step].values())) > LAYERS // 2
        assert len(set(values[-1].values())) > 1
        assert all(len({rates[layer] for rates in found["rates"]}) > 1 for layer in range(1, LAYERS + 1))
    one = trajectories(1)["dp", "dropping"]
    estimates = [0.2 * rate for rates in one["rates"] for rate in rates.values()]
    assert min(estimates) < 0.0165 < max(estimates)
    assert len(set(one["values"][-1].values())) == LAYERS


def test_layouts_that_drop_the_same_tokens_have_the_same_trajectory() -> None:
    """To the bit: pipeline stages, virtual stages, expert- and data-parallel ranks, recomputation."""
    one = trajectories(1)["dp", "dropping"]["values"]
    for world_size, layout in ((2, "dp"), (2, "ep2"), (2, "pp2"), (2, "pp2-vpp2"), (4, "ep2-pp2")):
        assert trajectories(world_size)[layout, "dropping"]["values"] == one, layout
    for name in ("padded", "full recomputation", "selective recomputation"):
        assert trajectories(1)["dp", name]["values"] == one, name
        assert trajectories(2)["pp2-vpp2", name]["values"] == one, name


def test_a_rank_of_fewer_tokens_drops_others() -> None:
    """Capacity is per rank: why tensor- and context-parallel layouts are not in the test above."""
    for layout in ("tp2-ep2", "cp2"):
        assert trajectories(2)[layout, "dropping"]["rates"] != trajectories(1)["dp", "dropping"]["rates"]


@on_ranks(1)
def test_a_skipped_step_leaves_the_coefficients() -> None:
    with groups():
        adaptive = Adaptive()
        before = adaptive.step(0)
        metrics = adaptive.controller.metrics
        adaptive.optimizer.succeeds = False
        assert adaptive.step(1) == before
        assert adaptive.controller.metrics is metrics
        adaptive.optimizer.succeeds = True
        after = adaptive.step(2)
        rates = adaptive.counted_drop_rates()
        assert after == pytest.approx({n: eq_7_to_9(before[n], rate) for n, rate in rates.items()}, rel=1e-14)


@on_ranks(1)
def test_nothing_follows_before_the_optimizer_stepped() -> None:
    with groups():
        adaptive = Adaptive()
        before = adaptive.coefficients()
        adaptive.training.run(0)
        assert adaptive.coefficients() == before
        adaptive.controller.commit()
        after = adaptive.coefficients()
        assert after != before
        adaptive.controller.commit()  # nothing staged
        assert adaptive.coefficients() == after


@on_ranks(1)
def test_evaluation_counts_nowhere() -> None:
    """In evaluation mode, and without gradients in training mode; between steps and before the first."""
    with groups():
        adaptive, undisturbed = Adaptive(), Adaptive()
        for number in range(2):
            for training in (True, False):
                for chunk in adaptive.training.wrapped:
                    chunk.train(training)
                with torch.set_grad_enabled(not training):
                    adaptive.training.run(100 + number, forward_only=True)
            for chunk in adaptive.training.wrapped:
                chunk.train()
            assert adaptive.step(number) == undisturbed.step(number)


@on_ranks(2)
def test_one_reduction_for_all_layers_and_one_update() -> None:
    with groups(Layout(ep=2)):
        adaptive = Adaptive(Layout(ep=2))
        update = AdaptiveAuxLossCoefficients.update
        with (
            mock.patch.object(
                AdaptiveAuxLossCoefficients, "update", autospec=True, side_effect=update
            ) as updated,
            mock.patch.object(adaptive.controller, "stage", side_effect=adaptive.controller.stage) as staged,
        ):
            adaptive.step(0)
            assert updated.call_count == staged.call_count == 1
        adaptive.training.run(1)
        with mock.patch.object(torch.distributed, "all_reduce", wraps=torch.distributed.all_reduce) as reduce:
            adaptive.controller.stage()
            assert reduce.call_count == 1
            (packed,) = reduce.call_args.args
            assert packed.shape == (LAYERS, 7 + EXPERTS) and packed.dtype == torch.float64


@on_ranks(1)
def test_a_second_controller_replaces_the_first() -> None:
    """Two would halve the micro-batches between them."""
    with groups():
        adaptive, undisturbed = Adaptive(), Adaptive()
        adaptive.controller = AuxLossController(adaptive.training.chunks)
        adaptive.controller.attach(adaptive.optimizer)
        assert adaptive.step(0) == undisturbed.step(0)


@on_ranks(1)
def test_what_ran_before_training_started_counts_nowhere() -> None:
    with groups():
        adaptive, undisturbed = Adaptive(), Adaptive()
        adaptive.training.config.finalize_model_grads_func = lambda *args, **kwargs: None
        adaptive.training.run(50)
        adaptive.controller.attach(adaptive.optimizer)
        adaptive.training.run(0)
        adaptive.optimizer.step()
        assert adaptive.coefficients() == undisturbed.step(0)


@on_ranks(1)
def test_it_needs_a_hook_to_stage_in() -> None:
    with groups():
        adaptive = Adaptive()
        adaptive.training.config.finalize_model_grads_func = None
        with pytest.raises(ConfigurationError, match="finalize_model_grads_func is None"):
            adaptive.controller.attach(adaptive.optimizer)


@on_ranks(1)
def test_fixed_coefficients_are_observed_only() -> None:
    with groups():
        adaptive = Adaptive(moe_adaptive_aux_loss=False, moe_aux_loss_coeff=0.07)
        adaptive.training.run(0)
        adaptive.optimizer.step()
        assert adaptive.controller.coefficient_by_layer() == dict.fromkeys(range(1, LAYERS + 1), 0.07)
        assert all(metrics.drop_rate > 0 for metrics in adaptive.controller.metrics.values())
        assert adaptive.controller.state_dict() == {}
        adaptive.controller.load_state_dict({"aux_loss_coefficients": {1: 0.5}})
        assert adaptive.controller.coefficient_by_layer()[1] == 0.07


@pytest.mark.parametrize("name", ["initial value", "no initial value"])
@on_ranks(1)
def test_without_a_controller_the_initial_value_stays(name: str) -> None:
    initial = 0.004 if name == "initial value" else None
    with groups():
        training = Training(num_layers=2, **ADAPTIVE, moe_adaptive_aux_loss_initial=initial)
        routers = [layer.mlp.router for layer in training.chunks[0].decoder.layers]
        training.run()
        assert [router.get_aux_loss_coeff("aux_loss") for router in routers] == [initial or 0.01] * 2


@on_ranks(1)
def test_bf16_does_not_round_the_coefficients() -> None:
    """Float16Module casts every buffer: these are none. The trajectory is that of Python's floats."""
    from megatron.core.transformer.module import Float16Module

    with groups():
        adaptive = Adaptive(
            params_dtype=torch.bfloat16,
            pipeline_dtype=torch.bfloat16,
            bf16=True,
            moe_adaptive_aux_loss_smoothing=0.99,
        )
        wrapper = Float16Module(adaptive.training.config, adaptive.training.chunks[0])
        assert wrapper.module.decoder.layers[0].mlp.router.weight.dtype == torch.bfloat16
        expected = dict.fromkeys(range(1, LAYERS + 1), 0.0165)
        for number in range(3):
            values = adaptive.step(number)
            rates = adaptive.counted_drop_rates()
            expected = {
                n: 0.99 * expected[n] + (1 - 0.99) * min(0.2 * rate, 0.0165) for n, rate in rates.items()
            }
        assert values == pytest.approx(expected, rel=1e-14)
        value = values[1]
        assert isinstance(value, float) and value != torch.tensor(value).bfloat16().item()
        assert adaptive.routers[1].get_aux_loss_coeff("aux_loss") == value


def resume(layout: Layout, state: dict[str, Any] | None, first: int) -> tuple[dict[str, Any], Any]:
    """Two steps from `state`: the state then, and what the routers had in force at the start."""
    with groups(layout):
        adaptive = Adaptive(layout)
        if state is not None:
            adaptive.controller.load_state_dict(state)
        in_force = {n: router.aux_loss_coefficient for n, router in adaptive.routers.items()}
        for number in (first, first + 1):
            adaptive.step(number)
        return adaptive.controller.state_dict(), in_force


def test_state_continues_in_any_layout() -> None:
    """Saved over two pipeline stages of two chunks each; every rank of every layout takes its layers from it."""
    state = run_ranks(in_world, 2, resume, Layout(pp=2, vpp=2), None, 0)[1][0]
    values = state["aux_loss_coefficients"]
    assert list(values) == [1, 2, 3, 4] and len(set(values.values())) == 4
    straight = trajectories(1)["dp", "dropping"]["values"]
    assert values == straight[2]
    for world_size, layouts in LAYOUTS.items():
        for layout in layouts[: 6 if world_size < 4 else 1]:
            for after, in_force in run_ranks(in_world, world_size, resume, layout, state, 2):
                assert in_force == {layer: values[layer] for layer in in_force}, layout
                assert in_force
                if layout.tp == layout.cp == 1:
                    assert after["aux_loss_coefficients"] == straight[4], layout


@on_ranks(2)
def test_a_state_that_is_none_is_refused_on_every_rank() -> None:
    """Also where the fault lies in another stage's layer, which would otherwise go on alone."""
    layout = Layout(pp=2)
    with groups(layout):
        controller = Adaptive(layout).controller
        before = controller.coefficients.values
        for coefficients, message in (
            ({1: 0.01, 2: 0.01}, r"for 2 MoE layers, the model has 4: \[1, 2\] against \[1, 2, 3, 4\]"),
            ({1: 0.01, 2: 0.01, 3: 0.01, 5: 0.01}, r"\[1, 2, 3, 5\] against \[1, 2, 3, 4\]"),
            ({1: 0.01, 2: 0.01, 3: 0.01, 4: math.nan}, "MoE layer 4 is nan, expected a finite number >= 0"),
            ({1: -1.0, 2: 0.01, 3: 0.01, 4: 0.01}, "MoE layer 1 is -1.0"),
        ):
            with pytest.raises(ConfigurationError, match=message):
                controller.load_state_dict({"aux_loss_coefficients": coefficients})
            assert controller.coefficients.values == before


@on_ranks(1)
def test_a_checkpoint_without_coefficients_starts_at_the_initial_value_with_a_warning() -> None:
    with groups():
        controller = Adaptive(moe_adaptive_aux_loss_initial=0.005).controller
        with mock.patch.object(logging.getLogger("nemo_skymoe.moe.controller"), "warning") as warning:
            controller.load_state_dict({})
        assert "every MoE layer starts at 0.005" in warning.call_args.args[0]
        assert controller.coefficients.values == [0.005] * LAYERS


@on_ranks(1)
def test_layers_without_experts_have_no_coefficient() -> None:
    """Numbers are those of all layers, not of the MoE layers alone."""
    with groups():
        for frequency in ([0, 1, 0, 1], 2):
            adaptive = Adaptive(moe_layer_freq=frequency)
            layers = (2, 4) if frequency != 2 else (1, 3)
            assert adaptive.controller.layers == layers
            state = adaptive.controller.state_dict()
            assert tuple(state["aux_loss_coefficients"]) == layers
            adaptive.controller.load_state_dict(state)


@on_ranks(1)
def test_two_routers_of_one_number_are_refused() -> None:
    with groups():
        training = Training(num_layers=2, **ADAPTIVE)
        training.chunks[0].decoder.layers[1].mlp.router.set_layer_number(1)
        with pytest.raises(ConfigurationError, match="layer number 1, expected one of its own"):
            AuxLossController(training.chunks)


def test_sizes_of_the_tests() -> None:
    """The virtual capacity above assumes equal micro-batches."""
    assert LENGTH * BATCH % EXPERTS == 0
