"""The coefficients' state: in any layout, from any checkpoint."""

import logging
import math
from typing import Any
from unittest import mock

import pytest

from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.ranks import run_ranks
from tests.moe.adaptive import LAYERS, LAYOUTS, Adaptive, trajectories
from tests.moe.worlds import Layout, groups, in_world, on_ranks


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
