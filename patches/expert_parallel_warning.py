"""Expert and tensor parallelism without sequence parallelism.

Upstream: megatron/core/model_parallel_config.py, 0.15 (the import is there in 0.14 and 0.16): a configuration with
both but no sequence parallelism warns through `warnings`, which the module does not import, and ends in a NameError.
"""

import warnings


def apply() -> bool:
    """Give the module what it forgot to import; says whether that was needed."""
    from megatron.core import model_parallel_config

    if hasattr(model_parallel_config, "warnings"):
        return False
    setattr(model_parallel_config, "warnings", warnings)  # noqa: B010
    return True
