"""A model in training with its controller, in any layout, and the trajectories of its coefficients."""

import functools
import math
from collections import defaultdict
from typing import Any

import pytest
import torch
from megatron.core import parallel_state

from nemo_skymoe.moe.controller import AuxLossController
from nemo_skymoe.ranks import run_ranks
from tests.moe.worlds import Layout, Training, groups, in_world

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
        modules: list[Any] = [module for chunk in self.training.chunks for module in chunk.modules()]
        self.routers: dict[int, Any] = {
            module.layer_number: module for module in modules if hasattr(module, "aux_loss_coefficient")
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
    return run_ranks(in_world, world_size, follow_all, world_size)[0]
