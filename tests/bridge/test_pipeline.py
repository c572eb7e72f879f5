"""A pipeline plan through Bridge: losses and gradients of one stage to the last bit, and the recomputation that was asked for."""

import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from megatron.core.transformer.transformer_layer import TransformerLayer

import nemo_skymoe.bridge  # noqa: F401  (before Bridge is imported)
from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.ranks import run_ranks
from tests.bridge.recorded import Record, Recorder, same_bits, start_alike, train
from tests.bridge.tiny import MOE, tiny_config, tiny_provider
from tests.cases import every

LAYERS, MICRO_BATCHES = 6, 4
TWO, TWO_VIRTUAL = "Ett|ttttL", "Ett|t|tt|tL"
PLANS: dict[str, tuple[str, Any, set[int]]] = {
    "uneven": (TWO, [[1], [3]], {1, 3, 4, 5}),
    "nothing recomputed": (TWO, None, set()),
    "virtual stages": (TWO_VIRTUAL, [[2, 0], [1, 0]], {1, 2, 3}),
}
"""Layout, recomputed layers by stage and virtual stage, and their global numbers."""


def provider(layout: str | None = None, recompute: Any = None, **options: Any) -> Any:
    stages = {"pipeline_model_parallel_size": 1 if layout is None else 2}
    return tiny_provider(
        replace(MOE, num_layers=LAYERS),
        pipeline_model_parallel_layout=layout,
        pipeline_recompute=recompute,
        **stages | options,
    )


class Counting(Recorder):
    """Also counts how often each layer runs in the first step."""

    def __init__(self) -> None:
        super().__init__(start=start_alike, gradients=True)
        self.calls: dict[int, int] = {}

    def on_train_start(self, context: Any) -> None:
        super().on_train_start(context)
        for chunk in context.model:
            for module in chunk.modules():
                if isinstance(module, TransformerLayer):
                    module.register_forward_pre_hook(self._count)

    def _count(self, layer: Any, _: Any) -> None:
        self.calls[layer.layer_number] = self.calls.get(layer.layer_number, 0) + 1


def trained(layout: str | None, recompute: Any) -> tuple[Record, dict[int, int]]:
    counting = Counting()
    # Without a distributed optimizer the gradients are whole when the step ends; nothing is clipped.
    config = tiny_config(
        steps=2,
        model=provider(layout, recompute),
        distributed_optimizer=False,
        overrides={"optimizer": {"clip_grad": 0.0}},
    )
    return train(config, counting), counting.calls


@functools.cache
def one_stage() -> Record:
    [(record, calls)] = run_ranks(trained, 1, None, None)
    assert calls == {layer: 2 * MICRO_BATCHES for layer in range(1, LAYERS + 1)}
    return record


@every(name=list(PLANS))
def test_losses_and_gradients_are_those_of_one_stage(name: str):
    layout, recompute, recomputed = PLANS[name]
    ranks, expected = run_ranks(trained, 2, layout, recompute), one_stage()
    assert [record.losses for record, _ in ranks if record.losses] == [expected.losses]
    assert len({*expected.losses}) == 2
    for step, whole in enumerate(expected.gradients):
        parts = [record.gradients[step] for record, _ in ranks]
        assert not parts[0].keys() & parts[1].keys()
        assert same_bits(parts[0] | parts[1], whole) and all(gradient.any() for gradient in whole.values())
    coefficients = [record.coefficients for record, _ in ranks]
    assert [first | second for first, second in zip(*coefficients, strict=True)] == expected.coefficients
    calls = ranks[0][1] | ranks[1][1]
    once = 2 * MICRO_BATCHES
    assert calls == {n: 2 * once if n in recomputed else once for n in range(1, LAYERS + 1)}


@every(
    ("options", "message"),
    [
        ({"recompute": [[1], [1]]}, "pipeline_model_parallel_layout is None"),
        ({"layout": "Ett|tttL"}, "with 5 layers, expected num_layers = 6"),
        (
            {"layout": TWO, "recompute": [[3], [0]]},
            "recompute is 3 on stage 0, virtual stage 0, expected 0 to its 2",
        ),
        ({"layout": TWO, "recompute": 3}, "pipeline_recompute is 3, expected"),
        ({"layout": TWO, "recompute": [["1"], [0]]}, "pipeline_recompute is .*, expected"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused_when_bridge_finalises(options: dict[str, Any], message: str):
    with pytest.raises(ConfigurationError, match=message):
        provider(**options).finalize()


def test_a_plan_survives_being_finalised_again():
    model = provider(TWO_VIRTUAL, [[2, 0], [1, 0]])
    model.finalize()
    model.finalize()
    assert str(model.pipeline_model_parallel_layout) == TWO_VIRTUAL
    assert model.virtual_pipeline_model_parallel_size == 2 and not model.batch_p2p_comm


def test_a_written_plan_becomes_layout_and_recomputation(tmp_path: Path):
    file = tmp_path / "plan.json"
    file.write_text(json.dumps({"layout": TWO, "recompute": [[1], [3]], "step_time": 1.0}))
    model = provider(pipeline_plan=str(file), pipeline_model_parallel_size=2)
    model.finalize()
    model.finalize()
    assert (str(model.pipeline_model_parallel_layout), model.pipeline_recompute) == (TWO, [[1], [3]])
    for changed, message in (
        (
            {"layout": TWO, "pipeline_plan": str(file)},
            "pipeline_model_parallel_layout is .* and pipeline_plan",
        ),
        ({"pipeline_plan": str(tmp_path / "no.json")}, "the pipeline plan '.*no.json' cannot be read"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            provider(**changed).finalize()
