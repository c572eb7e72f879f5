"""What learning rates may be."""

import math

from nemo_skymoe.config import ConfigurationError


def check_rates(max_lr: float, min_lr: float, expert_lr_multiplier: float) -> None:
    """Refuse learning rates that are out of range.

    Raises:
        ConfigurationError: The message names the rate.
    """
    if not 0 < max_lr < math.inf:
        raise ConfigurationError(f"max_lr is {max_lr}, expected a finite number above 0")
    if not 0 <= min_lr <= max_lr:
        raise ConfigurationError(f"min_lr is {min_lr}, expected 0 to max_lr = {max_lr}")
    if not 0 < expert_lr_multiplier < math.inf:
        raise ConfigurationError(
            f"expert_lr_multiplier is {expert_lr_multiplier}, expected a finite number above 0"
        )
