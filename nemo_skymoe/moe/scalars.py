"""The scalars of routers and experts that a training logs, by the names that `skymoe report` draws."""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import parallel_state

from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.moe.controller import AuxLossController
from nemo_skymoe.moe.similarity import expert_similarity
from nemo_skymoe.moe.telemetry import METRICS

WARM_STARTS = ("reset", "keep")


def router_scalars(controller: AuxLossController, histogram: bool = False) -> dict[str, float]:
    """Return the coefficients and the metrics of the last committed step, of this rank's layers.

    Args:
        controller: The controller of the model.
        histogram: Whether to add each expert's share of the assignments.
    """
    scalars = {f"moe/aux_loss_coefficient_layer_{n}": v for n, v in controller.coefficient_by_layer().items()}
    names = {name: name for name in METRICS}
    if controller.drop_rate_is_virtual:
        names["drop_rate"] = "virtual_drop_rate"
    for layer, metrics in controller.metrics.items():
        scalars |= {f"moe/{names[name]}_layer_{layer}": getattr(metrics, name) for name in METRICS}
        if histogram:
            scalars |= {f"moe/load_layer_{layer}_expert_{e}": share for e, share in enumerate(metrics.load)}
    return scalars


def similarity_scalars(model_chunks: Sequence[torch.nn.Module]) -> dict[str, float]:
    """Return the mean cosine between the experts of each of this rank's layers; every rank has to call it."""
    return {f"moe/expert_similarity_layer_{layer}": v for layer, v in expert_similarity(model_chunks).items()}


def over_the_pipeline(scalars: dict[str, float]) -> dict[str, float]:
    """Return the scalars of all pipeline stages, on each of their ranks; every rank has to call it."""
    group: Any = parallel_state.get_pipeline_model_parallel_group()
    if group.size() == 1:
        return scalars
    gathered: list[Any] = [None] * group.size()
    torch.distributed.all_gather_object(gathered, scalars, group=group)
    return {name: value for part in gathered for name, value in part.items()}


def check_logging(log_interval: int | None, similarity_interval: int, warm_start: str) -> None:
    """Refuse arguments of a front door's callback that it could not follow.

    Raises:
        ConfigurationError: The message names the argument.
    """
    if warm_start not in WARM_STARTS:
        raise ConfigurationError(f"warm_start is {warm_start!r}, expected 'reset' or 'keep'")
    for name, steps in (("log_interval", log_interval), ("similarity_interval", similarity_interval)):
        if steps is not None and (type(steps) is not int or steps < 0):
            raise ConfigurationError(f"{name} is {steps!r}, expected a number of steps, 0 for never")
