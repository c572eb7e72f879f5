"""Bridge's options of logging, and what the callback logs of routers and experts."""

from dataclasses import dataclass

from megatron.bridge.training.config import LoggerConfig


@dataclass(kw_only=True)
class SkyworkLoggerConfig(LoggerConfig):
    """Bridge's options, and those of the callback that a training of a Skywork-MoE is given."""

    similarity_interval: int = 100
    """Optimizer steps between two measurements of expert similarity; 0 for never."""
    expert_histogram: bool = False
    """Whether to log the share of assignments of every expert too."""
    warm_start: str = "reset"
    """Coefficients of a run that starts from another's weights: "reset" begins at the initial value, "keep" takes those of
    the checkpoint."""
