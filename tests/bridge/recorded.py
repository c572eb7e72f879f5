"""Trainings of Bridge, and all that one of them computed on this rank."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.bridge.training.callbacks import Callback, CallbackContext
from megatron.bridge.training.config import ConfigContainer
from megatron.core.utils import unwrap_model

from nemo_skymoe.bridge.callback import SkyworkMoECallback
from nemo_skymoe.bridge.checkpoint import coefficients_of
from nemo_skymoe.bridge.training import pretrain
from tests.moe.worlds import global_shape, local_part, parameters, weight


@dataclass
class Record:
    """One rank's part. Weights and gradients have the parameters' global names."""

    losses: list[float] = field(default_factory=list)
    """The loss of every step, on the last pipeline stage."""
    coefficients: list[dict[int, float]] = field(default_factory=list)
    """The coefficients of this rank's layers, before the first step and after every one."""
    skipped: list[bool] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    gradients: list[dict[str, Any]] = field(default_factory=list)
    weights: dict[str, Any] = field(default_factory=dict)
    optimizer: list[Any] = field(default_factory=list)
    """Every tensor that the optimizer has: master weights and moments."""


class Recorder(Callback):
    """Keeps what Bridge tells its callbacks, and looks into the model."""

    def __init__(self, start: Callable[[Any], None] | None = None, gradients: bool = False) -> None:
        self.record = Record()
        self._start = start
        self._gradients = gradients

    def on_train_start(self, context: CallbackContext) -> None:
        if self._start is not None:
            self._start(context)

    def on_train_step_start(self, context: CallbackContext) -> None:
        if not self.record.coefficients:
            self._keep_coefficients(context)

    def on_train_step_end(self, context: CallbackContext) -> None:
        record = self.record
        record.steps.append(context.state.train_state.step)
        record.losses += [float(loss) for loss in (context.loss_dict or {}).values()]
        record.skipped.append(bool(context.skipped_iter))
        self._keep_coefficients(context)
        if self._gradients:
            named = parameters(unwrap_model(context.model))
            record.gradients.append({name: _numpy(p.main_grad) for name, p in named.items()})

    def on_train_end(self, context: CallbackContext) -> None:
        named = parameters(unwrap_model(context.model))
        self.record.weights = {name: _numpy(parameter) for name, parameter in named.items()}
        self.record.optimizer = [_numpy(tensor) for tensor in optimizer_tensors(context.optimizer)]

    def _keep_coefficients(self, context: CallbackContext) -> None:
        controller = coefficients_of(context.state).controller
        if controller is not None:
            self.record.coefficients.append(
                dict(zip(controller.layers, controller.coefficients.values, strict=True))
            )


def optimizer_tensors(optimizer: Any) -> list[torch.Tensor]:
    """The master weights of every chained optimizer, and what it keeps for each."""
    inner = [one.optimizer for one in getattr(optimizer, "chained_optimizers", [optimizer])]
    weights = [weight for one in inner for group in one.param_groups for weight in group["params"]]
    kept = [one.state[weight] for one in inner for group in one.param_groups for weight in group["params"]]
    return weights + [state[name] for state in kept for name in sorted(state) if torch.is_tensor(state[name])]


def start_alike(context: CallbackContext) -> None:
    """Give every parameter the weights that its global name stands for: the same model in every layout."""
    for name, parameter in parameters(unwrap_model(context.model)).items():
        whole = weight(name, global_shape(name, parameter))
        parameter.data.copy_(local_part(name, parameter, whole))


def train(config: ConfigContainer, recorder: Recorder | None = None, **callback: Any) -> Record:
    """Pretrain in this rank; `callback` are the arguments of `SkyworkMoECallback`."""
    recorder = recorder or Recorder()
    pretrain(config, callbacks=[recorder, SkyworkMoECallback(**callback)])
    return recorder.record


def same_bits(first: Any, second: Any) -> bool:
    """Whether two records, or parts of them, are equal to the last bit."""
    if hasattr(first, "dtype"):
        return (
            first.dtype == second.dtype
            and first.shape == second.shape
            and first.tobytes() == second.tobytes()
        )
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same_bits(first[name], second[name]) for name in first)
    if isinstance(first, list):
        return len(first) == len(second) and all(map(same_bits, first, second))
    return first == second


def _numpy(tensor: torch.Tensor) -> Any:
    return tensor.detach().cpu().clone().numpy()
