"""Padding in Bridge's batches reaches the routers: they count what a batch without it has, on every pipeline stage."""

from collections.abc import Callable
from typing import Any

import pytest
from megatron.bridge.training import gpt_step
from megatron.bridge.training.state import GlobalState

from nemo_skymoe.bridge.callback import SkyworkMoECallback
from nemo_skymoe.bridge.checkpoint import coefficients_of
from nemo_skymoe.bridge.forward import forward_step
from nemo_skymoe.bridge.training import pretrain
from nemo_skymoe.moe.telemetry import LayerMetrics
from nemo_skymoe.ranks import run_ranks
from tests.bridge.recorded import Recorder, start_alike
from tests.bridge.tiny import SEQUENCE, tiny_config, tiny_provider

LENGTH = SEQUENCE // 2


class Metrics(Recorder):
    """Keeps the metrics of the last step."""

    found: dict[int, LayerMetrics]

    def on_train_step_end(self, context: Any) -> None:
        controller: Any = coefficients_of(context.state).controller
        self.found = dict(controller.metrics)


def padded(batch: dict[str, Any]) -> dict[str, Any]:
    """The second half of every sequence is padding."""
    batch["loss_mask"][:, LENGTH:] = 0
    batch["tokens"][:, LENGTH:] = 0
    return batch


def cut(batch: dict[str, Any]) -> dict[str, Any]:
    """The second half of every sequence does not exist."""
    shortened = {name: batch[name][:, :LENGTH] for name in ("tokens", "labels", "loss_mask", "position_ids")}
    return {**shortened, "attention_mask": batch["attention_mask"][..., :LENGTH, :LENGTH]}


def metrics(change: Callable[..., Any], step: Callable[..., Any], stages: int) -> dict[int, LayerMetrics]:
    def forward(state: GlobalState, data_iterator: Any, model: Any) -> Any:
        batch = {name: value.clone() for name, value in next(data_iterator).items()}
        return step(state, iter([change(batch)]), model)

    recorder = Metrics(start=start_alike)
    options = {"moe_expert_capacity_factor": None, "pipeline_model_parallel_size": stages}
    config = tiny_config(steps=1, model=tiny_provider(**options))
    pretrain(config, forward_step_func=forward, callbacks=[recorder, SkyworkMoECallback()])
    return recorder.found


def over_the_stages(stages: int, change: Callable[..., Any], step: Callable[..., Any]) -> dict[int, Any]:
    parts = run_ranks(metrics, stages, change, step, stages)
    return {layer: vars(found) for part in parts for layer, found in part.items()}


@pytest.mark.parametrize("stages", [1, 2])
def test_routers_do_not_count_padding(stages: int):
    without, told = over_the_stages(1, cut, forward_step), over_the_stages(stages, padded, forward_step)
    assert told.keys() == without.keys() == {1, 2}
    for layer, expected in without.items():
        assert told[layer] == {name: pytest.approx(value, rel=1e-5) for name, value in expected.items()}


def test_bridge_itself_tells_no_router():
    """This is what `nemo_skymoe.bridge.forward` is for."""
    without, untold = (
        over_the_stages(1, change, step)
        for change, step in ((cut, forward_step), (padded, gpt_step.forward_step))
    )
    assert untold[1]["load"] != pytest.approx(without[1]["load"], rel=1e-2)
