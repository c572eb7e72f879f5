"""Bridge's forward step, with routers that know the batch's padding. Bridge itself tells no router about it."""

from collections.abc import Iterator
from typing import Any, cast

from megatron.bridge.training import gpt_step
from megatron.bridge.training.state import GlobalState

from nemo_skymoe.moe.batch_padding import on_this_context_rank, padding_of
from nemo_skymoe.moe.controller import find_routers
from nemo_skymoe.moe.padding import padding_told

_ROUTERS = "_skywork_routers"


def forward_step(
    state: GlobalState, data_iterator: Iterator[Any], model: Any, return_schedule_plan: bool = False
) -> tuple[Any, Any]:
    """Run `megatron.bridge.training.gpt_step.forward_step` on the next batch.

    Returns:
        The output of this pipeline stage, and the function of its loss.
    """
    routers, config = _routers(model), cast(Any, state.cfg)
    if not routers or data_iterator is None:
        return gpt_step.forward_step(state, data_iterator, model, return_schedule_plan)
    batch = next(data_iterator)
    padding = None
    # Under context parallelism the documents of packed sequences are split one by one.
    if not (_is_packed(batch) and config.model.context_parallel_size > 1):
        padding = on_this_context_rank(padding_of(batch), routers[0].weight.device)
    with padding_told(routers, padding):
        return gpt_step.forward_step(state, iter([batch]), model, return_schedule_plan)


def _routers(model: Any) -> list[Any]:
    if not hasattr(model, _ROUTERS):
        # Past the modules' own attributes, where a list of modules would be looked for in the state.
        vars(model)[_ROUTERS] = tuple(find_routers([model]).values())
    return vars(model)[_ROUTERS]


def _is_packed(batch: Any) -> bool:
    return any(batch.get(name) is not None for name in ("cu_seqlens", "cu_seqlens_q"))
