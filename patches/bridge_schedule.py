"""A learning-rate schedule of one's own in Megatron-Bridge.

Upstream: megatron/bridge/training/optim.py, Megatron-Bridge 0.6: `setup_optimizer` lets a configuration of the optimizer
make it (`provide`), but makes Megatron's `OptimizerParamScheduler` itself, which has no shape with a second decay.
"""

import functools
from typing import Any

from nemo_skymoe.config import ConfigurationError


def apply() -> bool:
    """Let a `SchedulerConfig` that has `provide(optimizer_config, optimizer)` make the schedule; say whether this is new.

    Raises:
        ConfigurationError: Bridge makes its schedule in another way than the one that this changes.
    """
    from megatron.bridge.training import optim

    made: Any = getattr(optim, "_get_scheduler", None)
    if getattr(made, "asks_the_configuration", False):
        return False
    if made is None or "_get_scheduler" not in optim.setup_optimizer.__code__.co_names:
        raise ConfigurationError(
            "megatron.bridge.training.optim has no _get_scheduler that setup_optimizer calls, expected that of"
            " Megatron-Bridge 0.6: the learning rate would not follow the recipe's schedule"
        )
    optim._get_scheduler = _asking(made)
    return True


def _asking(upstream: Any) -> Any:
    @functools.wraps(upstream)
    def get_scheduler(optimizer_config: Any, scheduler_config: Any, optimizer: Any) -> Any:
        if hasattr(scheduler_config, "provide"):
            return scheduler_config.provide(optimizer_config, optimizer)
        return upstream(optimizer_config, scheduler_config, optimizer)

    get_scheduler.asks_the_configuration = True  # type: ignore[attr-defined]
    return get_scheduler
