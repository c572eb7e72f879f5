"""A checkpoint continued with expert parallelism that was saved without, or the reverse.

Upstream: megatron/core/optimizer/optimizer.py, megatron-core 0.14 to 0.19: with expert parallelism, experts have a
distributed optimizer of their own, chained to that of all other parameters; without, one optimizer has all of them. The
tensors in a fully reshardable checkpoint are the same in both cases, but `ChainedOptimizer.load_state_dict` takes the
rest of the state (options of groups, number of steps) only from as many optimizers as it has itself: "Expected 2 entries
in state dict, but got 4", or "KeyError: 'optimizer'".
"""

import functools
from typing import Any

from .targets import replace

_FLAG = "is_expert_parallel"


def apply() -> bool:
    """Let both be continued, and say whether that was not done yet."""
    from megatron.core.optimizer import optimizer

    chain: Any = optimizer.ChainedOptimizer
    load = chain.load_state_dict
    if hasattr(load, "__wrapped__"):
        return False

    @functools.wraps(load)
    def load_state_dict(self: Any, state_dict: Any) -> None:
        load(self, for_optimizers(state_dict, len(self.chained_optimizers)))

    replace(chain, "load_state_dict", load_state_dict)
    return True


def for_optimizers(state: Any, count: int) -> Any:
    """Return the state of a chain as `count` distributed optimizers load it; any other state as it is.

    Args:
        state: What Megatron has loaded: by the numbers of the optimizers the tensors that they have asked for, or with
            one optimizer the tensors alone; and from the checkpoint the rest, in the order of those that have saved it.
        count: Number of optimizers in the chain.
    """
    if not isinstance(state, dict):
        return state
    parts = {key: value for key, value in state.items() if isinstance(key, int)}
    rest = {key: value for key, value in state.items() if not isinstance(key, int)}
    if not parts or not rest:
        return state
    if count > 1 and "optimizer" in rest and all("param_state" in part for part in parts.values()):
        whole = _with_groups(rest, [rest])
        return {number: {**whole, **part} for number, part in parts.items()}
    if count == 1 and "param_state" in rest:
        saved = [parts[number] for number in sorted(parts)]
        return {**_with_groups(saved[0], saved), **rest}
    return state


def _with_groups(state: dict[str, Any], saved: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the state with the groups of all that was saved, as an optimizer of experts and as another looks for them."""
    groups = [group for one in saved for group in one["optimizer"]["param_groups"]]
    # The last of equal groups counts, which has to be the one that was really saved.
    both = [{**group, _FLAG: not group.get(_FLAG, False)} for group in groups] + groups
    return {**state, "optimizer": {**state["optimizer"], "param_groups": both}}
