"""Auxiliary losses under context parallelism.

Upstream: megatron/core/pipeline_parallel/schedules.py, 0.14 and 0.15 (fixed in 0.16): `forward_step_calc_loss`
scales the load-balancing and z-losses by 1 / micro-batches alone. The gradients of the ranks that share a sequence
add up to the whole, but DDP averages over them, so both losses act context_parallel_size times too weakly.
"""

import functools
import inspect
from types import SimpleNamespace
from typing import Any


def apply() -> bool:
    """Make up for the average, and say whether that was needed and not done yet."""
    from megatron.core.pipeline_parallel import schedules

    original = schedules.forward_step_calc_loss
    if hasattr(original, "__wrapped__") or not needed():
        return False
    signature = inspect.signature(original)

    @functools.wraps(original)
    def forward_step_calc_loss(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        arguments = signature.bind(*args, **kwargs).arguments
        _scale_by_context_ranks(arguments["config"], arguments.get("cp_group_size"))
        return result

    schedules.forward_step_calc_loss = forward_step_calc_loss
    return True


@functools.cache
def needed() -> bool:
    """Run Megatron's function for a micro-batch that two ranks share, and say whether it forgets that."""
    import torch
    from megatron.core.pipeline_parallel import schedules
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    scaler: Any = MoEAuxLossAutoScaler
    kept, scaler.main_loss_backward_scale = scaler.main_loss_backward_scale, None
    try:
        inspect.unwrap(schedules.forward_step_calc_loss)(
            model=None,
            output_tensor=torch.zeros(1, device="cpu"),  # a model may be in the making on the meta device
            loss_func=None,
            config=SimpleNamespace(
                num_moe_experts=2, calculate_per_token_loss=False, grad_scale_func=None, timers=None
            ),
            vp_stage=None,
            collect_non_loss_data=False,
            num_microbatches=1,
            forward_data_store=[],
            cp_group_size=2,
            is_last_stage=False,
        )
        scale: Any = scaler.main_loss_backward_scale
        return float(scale) != 2.0
    finally:
        scaler.main_loss_backward_scale = kept


def _scale_by_context_ranks(config: Any, size: int | None) -> None:
    from megatron.core import parallel_state
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    # Per-token losses are summed, not averaged.
    if getattr(config, "num_moe_experts", None) is None or config.calculate_per_token_loss:
        return
    size = parallel_state.get_context_parallel_world_size() if size is None else size
    MoEAuxLossAutoScaler.set_loss_scale(MoEAuxLossAutoScaler.main_loss_backward_scale * size)
