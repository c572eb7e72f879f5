"""Bridge's own pretraining under EDP and other layouts: every parameter's gradient is that of one rank, in float64."""

import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core import tensor_parallel
from megatron.core.utils import unwrap_model

import nemo_skymoe.bridge  # noqa: F401  (before Bridge is imported)
from nemo_skymoe.bridge.callback import SkyworkMoECallback
from nemo_skymoe.bridge.training import pretrain
from nemo_skymoe.ranks import run_ranks
from tests.bridge.recorded import Recorder, start_alike
from tests.bridge.tiny import SEQUENCE, tiny_config, tiny_provider
from tests.cases import every
from tests.moe.worlds import Training, relative_errors, weight

STEPS = 2
DOUBLE: dict[str, Any] = {
    "params_dtype": torch.float64,
    "pipeline_dtype": torch.float64,
    "moe_router_dtype": "fp64",
}
# A rank under sequence parallelism has other tokens, of which it drops others: the coefficients can be compared only if
# the ranks of a group count theirs together.
FIXED = {"moe_adaptive_aux_loss": False, "moe_aux_loss_coeff": 0.5, "moe_expert_capacity_factor": None}
EDP = {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2, "expert_tensor_parallel_size": 1}
SEQUENCE_PARALLEL: dict[str, dict[str, Any]] = {
    "all-to-all": {**EDP, "sequence_parallel": True, "edp_dispatcher": "alltoall"},
    "all-gather": {**EDP, "sequence_parallel": True, "edp_dispatcher": "allgather"},
    "tensor-parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True, "moe_edp": False},
}
LAYOUTS: dict[str, dict[str, Any]] = {
    **{f"{name}, fixed coefficients": {**layout, **FIXED} for name, layout in SEQUENCE_PARALLEL.items()},
    "all-gather": {**SEQUENCE_PARALLEL["all-gather"], "moe_capacity_scope": "edp"},
    "replicated": {**EDP, "edp_dispatcher": "replicated"},
    "pipeline": {"pipeline_model_parallel_size": 2},
    "data-parallel": {},
    "expert-parallel": {"expert_model_parallel_size": 2, "moe_edp": False},
}


class Whole(Recorder):
    """Keeps the gradients in full size, by the parameters' global names."""

    def on_train_step_end(self, context: Any) -> None:
        super().on_train_step_end(context)
        chunks: Any = SimpleNamespace(chunks=unwrap_model(context.model))
        self.record.gradients.append(Training.gradients(chunks))


def forward_step(state: Any, data_iterator: Any, model: Any) -> tuple[Any, Any]:
    """Bridge's step, but for a loss in float64: Megatron's cross entropy computes in float32."""
    batch = next(data_iterator)
    output = model(batch["tokens"], batch["position_ids"], batch["attention_mask"])

    def loss(logits: torch.Tensor) -> tuple[Any, ...]:
        whole = tensor_parallel.gather_from_tensor_model_parallel_region(logits)
        target = weight("target", (whole.shape[-1], 1, SEQUENCE)).transpose(0, 2)[:, 0]
        total = (whole * target + whole.square()).mean() + whole.gather(-1, batch["labels"][..., None]).mean()
        return total, {"loss": total.detach().clone().reshape(1)}

    return output, loss


def trained(layout: dict[str, Any]) -> Any:
    recorder = Whole(start=start_alike)
    config = tiny_config(
        steps=STEPS,
        model=tiny_provider(**{**DOUBLE, **layout}),
        distributed_optimizer=False,
        overrides={"optimizer": {"clip_grad": 0.0}},
    )
    pretrain(config, forward_step_func=forward_step, callbacks=[recorder, SkyworkMoECallback()])
    return recorder.record


@functools.cache
def one_rank(adaptive: bool) -> Any:
    return run_ranks(trained, 1, {} if adaptive else FIXED)[0]


@every(name=list(LAYOUTS))
def test_gradients_are_those_of_one_rank(name: str):
    adaptive = LAYOUTS[name].get("moe_adaptive_aux_loss", True)
    ranks, expected = run_ranks(trained, 2, LAYOUTS[name]), one_rank(adaptive)
    assert all(gradient.any() for gradient in expected.gradients[0].values())
    for step in range(STEPS):
        for record in ranks:
            errors = relative_errors(record.gradients[step], expected.gradients[step])
            assert {n: error for n, error in errors.items() if not error <= 1e-10} == {}
    for step, coefficients in enumerate(expected.coefficients):
        found = {n: value for record in ranks for n, value in record.coefficients[step].items()}
        assert found == pytest.approx(coefficients, rel=1e-12)
    assert (expected.coefficients[0] != expected.coefficients[-1]) == adaptive
