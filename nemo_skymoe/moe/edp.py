"""Choose a layer's EDP token dispatcher and put it in place of Megatron's, which refuses names it does not know."""

import copy
import functools
import logging
from types import SimpleNamespace
from typing import Any, cast

import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher

from nemo_skymoe.config import SkyworkOptions
from nemo_skymoe.moe.dispatch_allgather import AllGatherTokenDispatcher
from nemo_skymoe.moe.dispatch_alltoall import AllToAllTokenDispatcher, PaddedAllToAllTokenDispatcher
from nemo_skymoe.moe.dispatch_replicated import ReplicatedTokenDispatcher
from nemo_skymoe.moe.dispatcher import EdpTokenDispatcher
from nemo_skymoe.moe.mesh import check_edp_groups
from nemo_skymoe.moe.traffic import DISPATCHERS, Exchange, fewest_bytes, per_token

logger = logging.getLogger(__name__)

_TYPICAL_TOKENS = 4096


def install(layer: MoELayer) -> None:
    """Give a freshly built layer the dispatcher of `config.edp_dispatcher`, and its router the groups that go with it.

    Raises:
        ConfigurationError: The layer's process groups are not EDP's.
    """
    config: Any = layer.config
    stock = cast(MoETokenDispatcher, layer.token_dispatcher)
    check_edp_groups(layer.attn_tp_group, layer.ep_group, stock.tp_group)
    dispatcher = dispatcher_class(config)
    # Of the two groups of the same ranks attention's: one communicator less, and it has the timeout that was
    # asked for, which Megatron does not pass on to the expert-parallel group.
    tensor = layer.attn_tp_group
    # The class that Megatron passes here has another name in 0.14.
    groups = SimpleNamespace(ep=tensor, expt_tp=stock.tp_group, tp_ep=tensor)
    layer.token_dispatcher = dispatcher(config, groups, layer.router)
    if dispatcher is ReplicatedTokenDispatcher:
        exclude_replicas(layer.router)
        # Megatron's forward refuses to train without sequence parallelism where this group has several ranks.
        layer.attn_tp_group = stock.tp_group
    elif config.moe_capacity_scope == "edp":
        leave_dropping_to_the_dispatcher(layer.router)


def dispatcher_class(config: Any) -> type[EdpTokenDispatcher]:
    """The class that `config.edp_dispatcher` names or, for "auto", the one that sends the least."""
    name = resolve_dispatcher(config)
    if name == "alltoall":
        return (
            PaddedAllToAllTokenDispatcher
            if config.moe_pad_expert_input_to_capacity
            else AllToAllTokenDispatcher
        )
    return AllGatherTokenDispatcher if name == "allgather" else ReplicatedTokenDispatcher


def resolve_dispatcher(config: Any) -> str:
    """The name of the dispatcher; the choice of "auto" and its count are logged once by rank 0."""
    options = cast(SkyworkOptions, config)
    if options.edp_dispatcher != "auto":
        return options.edp_dispatcher
    if not config.sequence_parallel:
        choices: tuple[str, ...] = ("replicated",)
    elif options.moe_capacity_scope == "edp":
        choices = ("allgather",)
    else:
        choices = ("alltoall", "allgather")
    exchange = exchange_of(config)
    name = fewest_bytes(exchange, choices)
    _log_choice(name, choices, exchange)
    return name


def exchange_of(config: Any, tokens: int = _TYPICAL_TOKENS) -> Exchange:
    """What a layer of this configuration exchanges, for so many tokens a rank."""
    double = config.params_dtype == torch.float64 or config.moe_router_dtype == "fp64"
    return Exchange(
        ranks=config.expert_model_parallel_size,
        tokens=tokens,
        hidden_size=config.hidden_size,
        num_experts=config.num_moe_experts,
        topk=config.moe_router_topk,
        dtype_bytes=config.params_dtype.itemsize,
        weight_bytes=8 if double else 4,
        capacity_factor=config.moe_expert_capacity_factor,
        padded=config.moe_pad_expert_input_to_capacity,
    )


@functools.cache
def _log_choice(name: str, choices: tuple[str, ...], exchange: Exchange) -> None:
    if torch.distributed.get_rank() == 0:
        counts = ", ".join(f"{c} {per_token(DISPATCHERS[c](exchange), exchange):,.0f}" for c in choices)
        logger.info(
            f"edp_dispatcher 'auto' is '{name}': bytes a rank sends per layer and token of its own, forward and"
            f" backward, on {exchange.ranks} ranks: {counts}"
        )


def exclude_replicas(router: Any) -> None:
    """Leave the ranks that hold the same tokens out of the router's auxiliary and z-loss.

    Megatron divides both losses by the tensor-parallel size and adds the ranks' gradients up afterwards,
    which it only does under sequence parallelism.
    """
    router.tp_cp_group = router.cp_group
    router.tp_dp_cp_group = parallel_state.get_data_parallel_group(with_context_parallel=True)


def leave_dropping_to_the_dispatcher(router: Any) -> None:
    """A capacity of the whole group cannot be applied by a router that sees one rank's tokens."""
    router.config = copy.copy(router.config)
    router.config.moe_expert_capacity_factor = None
    router.config.moe_pad_expert_input_to_capacity = False
