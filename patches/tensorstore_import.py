"""NeMo's asynchronous checkpoints without Megatron's tensorstore strategy.

Upstream: nemo/utils/callbacks/dist_ckpt_io.py, NeMo 2.5 to 2.7: imports `dist_checkpointing.strategies.tensorstore`,
which megatron-core 0.16 removed with the zarr format that it read, takes all of Megatron for absent, and so refuses
to save asynchronously, which is NeMo's default: "ImportError: megatron-core was not found".
"""

from importlib.util import find_spec

_STRATEGIES = "megatron.core.dist_checkpointing.strategies"


def apply() -> bool:
    """Import what the failed import left out, and say whether that was needed and not done yet."""
    from nemo.utils.callbacks import dist_ckpt_io

    if dist_ckpt_io.HAVE_MEGATRON_CORE or find_spec(f"{_STRATEGIES}.tensorstore"):
        return False
    from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, AsyncRequest
    from megatron.core.dist_checkpointing.strategies.base import SaveShardedStrategy
    from megatron.core.dist_checkpointing.strategies.fully_parallel import (
        FullyParallelLoadStrategyWrapper,
        FullyParallelSaveStrategyWrapper,
    )
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
    from megatron.core.dist_checkpointing.validation import StrictHandling
    from megatron.core.parallel_state import get_data_parallel_group

    for imported in (
        AsyncCallsQueue,
        AsyncRequest,
        SaveShardedStrategy,
        FullyParallelLoadStrategyWrapper,
        FullyParallelSaveStrategyWrapper,
        TorchDistSaveShardedStrategy,
        StrictHandling,
        get_data_parallel_group,
    ):
        setattr(dist_ckpt_io, imported.__name__, imported)
    dist_ckpt_io.HAVE_MEGATRON_CORE = True
    return True
