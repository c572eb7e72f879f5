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
    from megatron.core import model_parallel_config

    failure = _failure(model_parallel_config.ModelParallelConfig)
    if isinstance(failure, NameError):
        setattr(model_parallel_config, "warnings", warnings)  # noqa: B010
    elif isinstance(failure, ValueError):
        _allow(model_parallel_config.ModelParallelConfig)
    return failure is not None


def _failure(config_class: Any) -> Exception | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config_class(tensor_model_parallel_size=2, expert_model_parallel_size=2)
    except (NameError, ValueError) as failure:
        return failure
    return None


def _allow(config_class: Any) -> None:
    """Hide the experts' parallelism from the check, which looks at nothing else."""
    check = config_class.__post_init__

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
