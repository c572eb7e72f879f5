"""NeMo's call of Megatron's optimizer.

Upstream: nemo/lightning/_strategy_lib.py, NeMo 2.5 to 2.7: `setup_megatron_optimizer` passes no_weight_decay_cond,
scale_lr_cond and lr_mult to `get_megatron_optimizer`, which since megatron-core 0.16 takes config_overrides in their
place, so that every training ends in a TypeError (NVIDIA-NeMo/Speech#15458).
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

Condition = Callable[[str, Any], bool]


def apply() -> bool:
    """Let the function take the old arguments too, and say whether that was needed and not done yet."""
    from megatron.core import optimizer

    original = optimizer.get_megatron_optimizer
    if hasattr(original, "__wrapped__") or "scale_lr_cond" in inspect.signature(original).parameters:
        return False

    @functools.wraps(original)
    def get_megatron_optimizer(
        config: Any,
        *args: Any,
        no_weight_decay_cond: Condition | None = None,
        scale_lr_cond: Condition | None = None,
        lr_mult: float = 1.0,
        **kwargs: Any,
    ) -> Any:
        if no_weight_decay_cond or scale_lr_cond:
            kwargs["config_overrides"] = config_overrides(
                config, no_weight_decay_cond, scale_lr_cond, lr_mult
            )
        return original(config, *args, **kwargs)

    optimizer.get_megatron_optimizer = get_megatron_optimizer
    return True


def config_overrides(
    config: Any, no_weight_decay_cond: Condition | None, scale_lr_cond: Condition | None, lr_mult: float
) -> dict[Any, Any]:
    """Return what megatron-core 0.16 takes in place of the conditions, which are asked with a parameter and its name.

    Without `no_weight_decay_cond`, biases and vectors are not decayed, which is Megatron's default.
    """
    from megatron.core import optimizer

    newer: Any = optimizer
    overrides: dict[Any, Any] = newer.get_standard_config_overrides(config)
    if no_weight_decay_cond:
        overrides = {key: values for key, values in overrides.items() if "wd_mult" not in values}
        overrides[_key("no_weight_decay_cond", no_weight_decay_cond)] = {"wd_mult": 0.0}
    # Megatron tells groups apart by their factors when it loads them: two with the same must be one.
    if scale_lr_cond and lr_mult != 1.0:
        overrides[_key("scale_lr_cond", scale_lr_cond)] = {"lr_mult": lr_mult}
    return overrides


def _key(name: str, condition: Condition) -> Any:
    from megatron.core.optimizer import optimizer_config

    newer: Any = optimizer_config
    asked = newer.ParamWithNamePredicate(name=name, fn=lambda parameter, of: condition(of, parameter))
    return newer.ParamKey(with_name_predicate=asked)
