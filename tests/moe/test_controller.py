"""The adaptive coefficients in training, against eq. (7) to (9) on drop rates counted from the routing itself."""

import functools
from unittest import mock

import pytest
import torch
from megatron.core.distributed import finalize_model_grads

from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.moe.aux_loss import AdaptiveAuxLossCoefficients
from nemo_skymoe.moe.controller import AuxLossController
from tests.cases import every
from tests.moe.adaptive import (
    ADAPTIVE,
    EXPERTS,
    LAYERS,
    LAYOUTS,
    STEPS,
    Adaptive,
    eq_7_to_9,
    trajectories,
)
from tests.moe.worlds import BATCH, LENGTH, Layout, Training, groups, on_ranks


@every("world_size", LAYOUTS)
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
        adaptive.controller.commit()  # nothing collected
        assert adaptive.coefficients() == after


@on_ranks(2)
def test_gradients_finalised_several_times_before_a_step_count_together() -> None:
    """As with accumulated gradients: the drop rate is that of all micro-batches, a skipped step forgets them all."""
    with groups(Layout(ep=2)):
        adaptive = Adaptive(Layout(ep=2))
        before = adaptive.coefficients()
        for number in range(3):
            adaptive.training.run(number)
        rates = adaptive.counted_drop_rates()
        adaptive.optimizer.step()
        expected = {n: eq_7_to_9(before[n], rate) for n, rate in rates.items()}
        assert adaptive.coefficients() == pytest.approx(expected, rel=1e-14)
        metrics = adaptive.controller.metrics
        assert {n: m.drop_rate for n, m in metrics.items()} == pytest.approx(rates, rel=1e-14)
        after = adaptive.coefficients()
        for number in range(2):
            adaptive.training.run(number)
        adaptive.optimizer.succeeds = False
        adaptive.optimizer.step()
        assert adaptive.coefficients() == after and adaptive.controller.metrics is metrics


@on_ranks(1)
def test_a_step_in_which_no_token_counts_leaves_the_coefficients() -> None:
    with groups():
        adaptive = Adaptive()
        before = adaptive.coefficients()
        adaptive.controller.collect()
        adaptive.controller.commit()
        assert adaptive.coefficients() == before


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
            mock.patch.object(
                adaptive.controller, "collect", side_effect=adaptive.controller.collect
            ) as collected,
        ):
            adaptive.step(0)
            assert updated.call_count == collected.call_count == 1
        adaptive.training.run(1)
        with mock.patch.object(torch.distributed, "all_reduce", wraps=torch.distributed.all_reduce) as reduce:
            adaptive.controller.collect()
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
def test_a_saved_configuration_names_the_function_that_the_hook_replaces() -> None:
    """Bridge writes functions by their names, and refuses to read one that is not Megatron's."""
    with groups():
        adaptive = Adaptive()
        for function in (
            finalize_model_grads,
            functools.partial(finalize_model_grads, force_all_reduce=True),
        ):
            adaptive.training.config.finalize_model_grads_func = function
            adaptive.controller.attach(adaptive.optimizer)
            hook = adaptive.training.config.finalize_model_grads_func
            assert hook is not function
            assert (hook.__module__, hook.__qualname__) == (
                finalize_model_grads.__module__,
                "finalize_model_grads",
            )


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


@every("name", ["initial value", "no initial value"])
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
