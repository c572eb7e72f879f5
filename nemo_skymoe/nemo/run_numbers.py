"""Check the plain numbers of a training on its parts, or on their Fiddle configurations: sizes, batches, rates."""

from collections.abc import Iterator
from typing import Any

from nemo.utils import logging

from nemo_skymoe import option_values
from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.nemo.learning_rate import LearningRateSchedule
from nemo_skymoe.option_values import finite, is_a

_SIZES = ("tensor_model", "pipeline_model", "context", "expert_model")
_OPTIONAL = ("expert_tensor_parallel_size", "virtual_pipeline_model_parallel_size")
_OPTIMIZERS = ("adam", "sgd")
"""The optimizers of Megatron."""
_BATCH = ("seq_length", "global_batch_size", "micro_batch_size")


def check_numbers(config: Any, trainer: Any, data: Any = None, optim: Any = None) -> None:
    """Refuse a number that cannot work before anything is computed with it.

    Args:
        config: The model's configuration. This and the next three arguments are built objects or Fiddle configurations.
            None is skipped.

    Raises:
        ConfigurationError: The message has the option's name, its value and what was expected.
    """
    reason = config is not None and option_values.wrong_size(config)
    if reason:
        raise ConfigurationError(reason)
    strategy = trainer.strategy
    if not hasattr(strategy, "pipeline_model_parallel_size"):
        raise ConfigurationError(
            f"trainer.strategy is {strategy!r}, expected a MegatronStrategy of nemo.lightning"
        )
    for option, value in _counts(trainer, strategy, data):
        if not is_a(value, int) or value < 1:
            raise ConfigurationError(f"{option} is {value!r}, expected a whole number above 0")
    logged = getattr(trainer, "log_every_n_steps", None)
    if logged is not None and (not is_a(logged, int) or logged < 0):
        raise ConfigurationError(
            f"trainer.log_every_n_steps is {logged!r}, expected a whole number, 0 for never"
        )
    workers = getattr(data, "num_workers", None)
    if workers is not None and (not is_a(workers, int) or workers < 0):
        raise ConfigurationError(f"data.num_workers is {workers!r}, expected a whole number, 0 for none")
    _check_rates(optim)


def _counts(trainer: Any, strategy: Any, data: Any) -> Iterator[tuple[str, Any]]:
    """Yield the options that have to be at least 1, and their values."""
    yield "trainer.num_nodes", getattr(trainer, "num_nodes", 1)
    yield "trainer.devices", getattr(trainer, "num_devices", getattr(trainer, "devices", 1))
    for name in _SIZES:
        yield f"{name}_parallel_size", getattr(strategy, f"{name}_parallel_size", 1)
    for option in _OPTIONAL:
        if getattr(strategy, option, None) is not None:
            yield option, getattr(strategy, option)
    for option in _BATCH:
        if hasattr(data, option):
            yield f"data.{option}", getattr(data, option)
    interval = getattr(trainer, "val_check_interval", None)
    if is_a(interval, int):
        yield "trainer.val_check_interval", interval


def _check_rates(optim: Any) -> None:
    config = getattr(optim, "config", None)
    if config is None:
        return
    kind = getattr(config, "optimizer", "adam")
    if kind not in _OPTIMIZERS:
        raise ConfigurationError(f"optim.config.optimizer is {kind!r}, expected {' or '.join(_OPTIMIZERS)}")
    peak: Any = getattr(config, "lr", None)
    least: Any = getattr(config, "min_lr", None)
    if not finite(peak) or peak <= 0:
        raise ConfigurationError(f"optim.config.lr is {peak!r}, expected a finite number above 0")
    for option in ("min_lr", "weight_decay", "clip_grad"):
        value = getattr(config, option, None)
        if value is not None and (not finite(value) or value < 0):
            raise ConfigurationError(
                f"optim.config.{option} is {value!r}, expected a finite number, at least 0"
            )
    schedule = getattr(optim, "lr_scheduler", None)
    if least is None or schedule is None:
        return
    if not isinstance(schedule, LearningRateSchedule):
        if least > peak:
            raise ConfigurationError(
                f"optim.config.min_lr is {least}, expected at most optim.config.lr = {peak}"
            )
        return
    end = schedule.final_fraction * peak
    if abs(end - least) > 1e-6 * peak:
        logging.warning(
            f"optim.config.min_lr is {least:g}, which this schedule does not read: its shape ends at"
            f" optim.lr_scheduler.final_fraction={schedule.final_fraction:g} of optim.config.lr, {end:g}"
        )


def check_batches(trainer: Any, data: Any) -> None:
    """Refuse a batch that the micro-batches of all data-parallel ranks do not divide.

    The sizes themselves are checked before.

    Raises:
        ConfigurationError: The message has the sizes.
    """
    batch, micro = (getattr(data, name, None) for name in ("global_batch_size", "micro_batch_size"))
    if batch is None or micro is None:
        return
    strategy = trainer.strategy
    ranks = trainer.num_devices * trainer.num_nodes
    ranks //= strategy.tensor_model_parallel_size * strategy.pipeline_model_parallel_size
    ranks //= strategy.context_parallel_size
    if batch % (micro * ranks):
        raise ConfigurationError(
            f"data.global_batch_size is {batch}, expected a multiple of data.micro_batch_size={micro} x {ranks}"
            f" data-parallel ranks = {micro * ranks}"
        )
