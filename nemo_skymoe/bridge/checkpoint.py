"""The place of the coefficients in Bridge's checkpoints: the state of the schedule, which they are a part of.

Bridge saves nothing of its callbacks. A checkpoint manager is what it lets others provide, and the state of the
learning-rate schedule is what it saves and restores with the optimizer in every kind of checkpoint: global or local, in
the background or not, under any parallel sizes. Megatron's schedule ignores entries that are not its own.
"""

import dataclasses
from typing import Any

from megatron.bridge.training.callbacks import CallbackManager
from megatron.bridge.training.checkpointing import (
    CheckpointLoadContext,
    CheckpointSaveContext,
    DefaultCheckpointManager,
)
from megatron.bridge.training.state import GlobalState

from nemo_skymoe.moe.controller import AuxLossController

KEY = "skywork_moe"
"""The entry of the schedule's state that holds the state of the controller."""
_ATTRIBUTE = "skywork_coefficients"


@dataclasses.dataclass
class Coefficients:
    """What a training's checkpoint manager and its callback share."""

    controller: AuxLossController | None = None
    """The controller, once the callback has made it."""
    restored: dict[str, Any] | None = None
    """The controller's state in the checkpoint that the run continues; None where it continues none."""


def coefficients_of(state: GlobalState) -> Coefficients:
    """Return what manager and callback of a training share."""
    return vars(state).setdefault(_ATTRIBUTE, Coefficients())


class SkyworkCheckpointManager(DefaultCheckpointManager):
    """Bridge's own manager, with the coefficients in what it saves and loads; see `checkpoint.custom_manager_class`."""

    def save(self, ctx: CheckpointSaveContext, callback_manager: CallbackManager | None) -> None:
        """Save a checkpoint, as Bridge does. Every rank calls this."""
        super().save(_with_coefficients(ctx), callback_manager)

    def load(self, ctx: CheckpointLoadContext) -> tuple[int, int]:
        """Load a checkpoint, as Bridge does; return its iteration and the number of floating-point operations so far."""
        return super().load(_with_coefficients(ctx))


def manager_name() -> str:
    """Return the value of `checkpoint.custom_manager_class`."""
    return f"{SkyworkCheckpointManager.__module__}.{SkyworkCheckpointManager.__qualname__}"


def _with_coefficients(ctx: Any) -> Any:
    if ctx.opt_param_scheduler is None:
        return ctx
    return dataclasses.replace(ctx, opt_param_scheduler=_Schedule(ctx.opt_param_scheduler, ctx.state))


class _Schedule:
    """A learning-rate schedule whose state has the coefficients too."""

    def __init__(self, schedule: Any, state: GlobalState) -> None:
        self._schedule = schedule
        self._coefficients = coefficients_of(state)

    def state_dict(self) -> dict[str, Any]:
        controller = self._coefficients.controller
        own = {} if controller is None else {KEY: controller.state_dict()}
        return {**self._schedule.state_dict(), **own}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._coefficients.restored = state.get(KEY, {})
        self._schedule.load_state_dict({name: value for name, value in state.items() if name != KEY})
