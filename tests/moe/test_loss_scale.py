"""The scale that a training gives Megatron for the losses of its MoE layers acts on ours, and on nothing else."""

from dataclasses import fields
from typing import Any

import pytest
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from nemo_skymoe.ranks import run_ranks
from tests.cases import every
from tests.moe.worlds import Training, groups, in_world, relative_errors

STRENGTH = {"moe_aux_loss_coeff": 0.5, "moe_z_loss_coeff": 0.3}
TWICE = {name: 2 * value for name, value in STRENGTH.items()}


def gradients(**options: Any) -> dict[str, Tensor]:
    with groups():
        training = Training(**options)
        training.run()
        return training.gradients()


@pytest.mark.skipif(
    "moe_grad_scale_func" not in {field.name for field in fields(TransformerConfig)},
    reason="this Megatron-Core has no moe_grad_scale_func",
)
@every("form", ["switch", "square"])
@every("per_token", [False, True])
def test_twice_the_scale_is_twice_the_coefficients(form: str, per_token: bool) -> None:
    def both() -> dict[str, float]:
        options = {"moe_aux_loss_form": form, "calculate_per_token_loss": per_token}
        scaled = gradients(**options, **STRENGTH, moe_grad_scale_func=lambda: 2.0)
        plain = gradients(**options, **STRENGTH)
        errors = relative_errors(scaled, gradients(**options, **TWICE))
        assert max(relative_errors(plain, scaled).values()) > 1e-3
        return errors

    [errors] = run_ranks(in_world, 1, both)
    assert max(errors.values()) <= 1e-10
