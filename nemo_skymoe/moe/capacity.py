"""A limit for the capacity of an expert: it never has more places than there are tokens."""

import copy
from typing import Any

# The factor stays just below E / k: at E / k itself, rounding could make ceil(T k / E * factor) equal T + 1.
_BELOW_ONE = 1 - 2.0**-40


def with_capacity_in_reach(config: Any) -> Any:
    """Return `config` itself, or a copy whose capacity factor gives every expert exactly one place for every token.

    If T tokens each choose k of E experts, an expert has ceil(T k / E * factor) places. These are more than T if the
    factor is above E / k. Megatron up to 0.15 then asks a top-k for more rows than there are. With
    `moe_pad_expert_input_to_capacity`, the dispatcher of every version counts on rows that do not exist.
    """
    factor = config.moe_expert_capacity_factor
    most = config.num_moe_experts / config.moe_router_topk * _BELOW_ONE
    if factor is None or factor <= most:
        return config
    reached = copy.copy(config)
    reached.moe_expert_capacity_factor = most
    return reached
