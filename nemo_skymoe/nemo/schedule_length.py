"""Fit learning-rate schedules to the steps that are really run: in shortened, resumed and early-ending runs."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import EarlyStopping, Timer
from nemo.utils import logging
from torch.optim.lr_scheduler import LambdaLR

from nemo_skymoe.config import ConfigurationError

PARTS = ("warmup_steps", "hold_steps", "constant_steps", "decay_steps")
"""The parts of a schedule that are counted in steps, by the names that NeMo's schedulers and ours give them."""
_LEAST_RUN = 10
"""A run of at least this many steps keeps at least one step of every part of its schedule."""


def follow_max_steps(optim: Any, max_steps: int) -> None:
    """Fit a learning-rate schedule to the steps that are really run, which may differ from those that it was made for.

    NeMo gives its schedulers `trainer.max_steps`, but not how many of these belong to warm-up and decay. These lengths
    are meant for the schedule's own `max_steps`. A shorter run keeps the shares that they have of it, and any other run
    keeps the lengths. If they leave less than a tenth of the run to the schedule's shape, where the rate would jump,
    each is at most a tenth of the run. A warning names every change.

    Raises:
        ConfigurationError: The phases end at another step than the run.
    """
    scheduler: Any = getattr(optim, "lr_scheduler", None)
    if scheduler is None:
        return
    phases = getattr(scheduler, "phases", None)
    if phases is not None:
        _check_phases(phases, max_steps)
        return
    lengths = {name: getattr(scheduler, name) for name in PARTS if _is_count(getattr(scheduler, name, None))}
    meant_for = getattr(scheduler, "max_steps", None)
    fitted = _fitted(lengths, meant_for, max_steps)
    if fitted != lengths:
        changes = " and ".join(
            f"{name} is {fitted[name]} instead of {length}" for name, length in lengths.items()
        )
        logging.warning(
            f"the learning-rate schedule has max_steps={meant_for} and is run for trainer.max_steps={max_steps}: its"
            f" {changes}"
        )
    for name, length in fitted.items():
        setattr(scheduler, name, length)
    if meant_for is not None:
        scheduler.max_steps = max_steps


def _check_phases(phases: Any, max_steps: int) -> None:
    total = sum(phase.max_steps for phase in phases)
    if total != max_steps:
        raise ConfigurationError(
            f"trainer.max_steps is {max_steps}, expected the {total} of all phases: change the tokens in the file"
            " of phases"
        )


def _fitted(lengths: dict[str, int], meant_for: Any, max_steps: int) -> dict[str, int]:
    if _is_count(meant_for) and max_steps < meant_for and _leaves_shape(lengths, meant_for):
        least = 1 if max_steps >= _LEAST_RUN else 0
        shares = {name: length * max_steps / meant_for for name, length in lengths.items()}
        return {name: max(least, round(share)) for name, share in shares.items()}
    if _leaves_shape(lengths, max_steps):
        return lengths
    return {name: min(length, max_steps // 10) for name, length in lengths.items()}


def _leaves_shape(lengths: dict[str, int], steps: int) -> bool:
    return not lengths or sum(lengths.values()) <= 0.9 * steps


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0


class ScheduleOfThisRun(pl.Callback):
    """Lets a resumed schedule take nothing but its position from the checkpoint.

    Torch's schedulers restore all of their state, and the optimizer restores its last rate. A run that was extended
    would therefore keep the old `max_steps` under NeMo's schedulers, and under any scheduler the old peak and one step
    at the old rate. With this callback all rates, that of the first step included, are those of this run's schedule. If
    they differ from the checkpoint's, a warning says so.
    """

    def __init__(self, optim: Any) -> None:
        self._made: list[tuple[Any, dict[str, Any]]] = []
        module: Any = getattr(optim, "lr_scheduler", None)
        if module is not None:
            module.scheduler = self._remembered(module.scheduler)

    def _remembered(self, make: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(make)
        def scheduler(*args: Any, **kwargs: Any) -> Any:
            made = make(*args, **kwargs)
            for one in _schedulers(made):
                own = {name: value for name, value in vars(one).items() if name not in _POSITION}
                self._made.append((one, own))
            return made

        return scheduler

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put back this run's schedule: if there is a checkpoint, it has been loaded by now."""
        for scheduler, own in self._made:
            vars(scheduler).update(own)
            _put_rates(scheduler)


_POSITION = ("last_epoch", "_step_count", "_last_lr")


def _schedulers(made: Any) -> Iterator[Any]:
    """Yield the schedulers whose rate is a function of the step alone: NeMo's, and ours."""
    config = made.get("lr_scheduler") if isinstance(made, dict) else None
    scheduler = config.get("scheduler") if isinstance(config, dict) else None
    if isinstance(scheduler, LambdaLR) or type(scheduler).__module__ == "nemo.core.optim.lr_scheduler":
        yield scheduler


def _put_rates(scheduler: Any) -> None:
    scheduler._get_lr_called_within_step = True  # otherwise it warns that `get_last_lr` is meant
    rates, before = scheduler.get_lr(), scheduler._last_lr
    scheduler._get_lr_called_within_step = False
    if any(abs(rate - old) > 1e-9 * abs(old) for rate, old in zip(rates, before, strict=True)):
        logging.warning(
            f"the learning rate goes on at {rates[0]:.4g} after step {scheduler.last_epoch}, by the schedule of this"
            f" run; that of the checkpoint was at {before[0]:.4g}"
        )
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates


def check_early_end(trainer: Any) -> None:
    """Refuse epochs that begin again with the same data, and say what may end the run before its schedule does.

    Raises:
        ConfigurationError: `limit_train_batches` or `overfit_batches` make an epoch shorter than the run.
    """
    steps = trainer.max_steps
    limit = getattr(trainer, "limit_train_batches", None)
    whole = limit is None or (
        limit == 1 if type(limit) is float else limit >= steps
    )  # 1 is one batch, 1.0 all
    if not whole:
        option = "overfit_batches" if getattr(trainer, "overfit_batches", 0) else "limit_train_batches"
        expected = (
            "0" if option == "overfit_batches" else f"1.0, or at least the {steps} of trainer.max_steps"
        )
        raise ConfigurationError(
            f"trainer.{option} is {limit}, expected {expected}: every epoch would train on the same first batches"
            " again; trainer.max_steps shortens a run"
        )
    if getattr(trainer, "fast_dev_run", False):
        return
    for reason in _early_ends(trainer):
        logging.warning(
            f"{reason} may end the run before the {steps} steps of trainer.max_steps, over which the learning rate"
            " falls: it would end above its final value"
        )


def _early_ends(trainer: Any) -> Iterator[str]:
    epochs = getattr(trainer, "max_epochs", None)
    if epochs is not None and epochs != -1:
        yield f"trainer.max_epochs={epochs}"
    for callback in getattr(trainer, "callbacks", ()):
        if isinstance(callback, Timer):
            yield f"trainer.max_time ({type(callback).__name__})"
        elif isinstance(callback, EarlyStopping):
            yield f"the callback {type(callback).__name__}"
