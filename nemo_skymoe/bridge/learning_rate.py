"""Another learning rate for the experts, as Bridge takes the options of a group of parameters."""

import math
from dataclasses import dataclass
from typing import Any

from megatron.bridge.training.config import (
    OptimizerConfigOverrideProvider,
    OptimizerConfigOverrideProviderContext,
)
from megatron.core.optimizer import ParamKey

from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.moe import EXPERT_PARAMETERS


@dataclass
class ExpertLearningRate(OptimizerConfigOverrideProvider):
    """Multiplies the learning rate of routed experts, from its peak to its end. `optimizer_config_override_provider` takes it."""

    multiplier: float = 1.0
    """The experts' learning rate, as a multiple of that of everything else."""

    def finalize(self) -> None:
        """Check the multiplier.

        Raises:
            ConfigurationError: It is not a finite number above 0.
        """
        if not 0 < self.multiplier < math.inf:
            raise ConfigurationError(
                f"the multiplier of the experts' learning rate is {self.multiplier}, expected a finite number above 0"
            )

    def build_config_overrides(
        self, context: OptimizerConfigOverrideProviderContext
    ) -> dict[Any, Any] | None:
        """Return Bridge's own overrides, and the experts'."""
        self.finalize()
        overrides = super().build_config_overrides(context) or {}
        optimizer = context.optimizer_config
        if self.multiplier == 1:
            return overrides or None
        if optimizer.lr is None:
            raise ConfigurationError(
                "optimizer.lr is None, expected the learning rate that the experts' is a multiple of"
            )
        own: dict[str, float] = {"max_lr": self.multiplier * optimizer.lr}
        if optimizer.min_lr is not None:
            own["min_lr"] = self.multiplier * optimizer.min_lr
        return {**overrides, ParamKey(name=f"*{EXPERT_PARAMETERS}*"): own}
