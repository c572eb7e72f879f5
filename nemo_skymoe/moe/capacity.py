"""Expert capacity: as many places as an expert has tokens to choose from, and never more."""

import copy
from typing import Any

# Keeps the product with a number of tokens from being rounded up to one more.
_BELOW_ONE = 1 - 2.0**-40


def with_capacity_in_reach(config: Any) -> Any:
    """`config` itself, or a copy whose capacity factor gives every expert a place for every token.

    T tokens that choose k of E experts give an expert ceil(T k / E * factor) places, more than T of them where the
    factor is above E / k. Megatron up to 0.15 then asks a top-k for more rows than there are, and with
    `moe_pad_expert_input_to_capacity` every version's dispatcher counts on rows that do not exist.
    """
    factor = config.moe_expert_capacity_factor
    most = config.num_moe_experts / config.moe_router_topk * _BELOW_ONE
    if factor is None or factor <= most:
        return config
    reached = copy.copy(config)
    reached.moe_expert_capacity_factor = most
    return reached
