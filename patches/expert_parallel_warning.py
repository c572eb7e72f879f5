"""Expert and tensor parallelism without sequence parallelism.

Upstream: megatron/core/model_parallel_config.py: 0.14 refuses a configuration with both but no sequence parallelism,
which its experts do not need; 0.15 warns of it through `warnings`, which the module does not import, and ends in a
NameError. Cured in 0.16.
"""

import functools
import warnings
from typing import Any


def apply() -> bool:
    """Allow such a configuration, and say whether that was needed and not done yet."""
    from megatron.core import model_parallel_config, package_info

    if [package_info.MAJOR, package_info.MINOR] < [0, 15]:
        return _allow(model_parallel_config.ModelParallelConfig)
    if hasattr(model_parallel_config, "warnings"):
        return False
    setattr(model_parallel_config, "warnings", warnings)  # noqa: B010
    return True


def _allow(config_class: Any) -> bool:
    """Hide the experts' parallelism from the check, which looks at nothing else."""
    check = config_class.__post_init__
    if hasattr(check, "__wrapped__"):
        return False

    @functools.wraps(check)
    def __post_init__(self: Any) -> None:
        size = self.expert_model_parallel_size
        if not self.sequence_parallel:
            self.expert_model_parallel_size = 1
        try:
            check(self)
        finally:
            self.expert_model_parallel_size = size

    config_class.__post_init__ = __post_init__
    return True
