"""Choose a layer's EDP token dispatcher and put it in place of Megatron's, which refuses names it does not know."""

import functools
import logging
from types import SimpleNamespace
from typing import Any, cast

import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher

from nemo_skymoe.config import ConfigurationError, SkyworkOptions
from nemo_skymoe.dispatchers import DISPATCHERS, fitting
from nemo_skymoe.moe.dispatcher import EdpTokenDispatcher
from nemo_skymoe.moe.mesh import check_edp_groups, edp_device_meshes
from nemo_skymoe.moe.overlap import OverlappedTokenDispatcher
from nemo_skymoe.traffic import Exchange, per_token

logger = logging.getLogger(__name__)

_TYPICAL_TOKENS = 4096


def install(layer: MoELayer, dispatcher: type[EdpTokenDispatcher] | None = None) -> None:
    """Give a freshly built layer its EDP dispatcher, and its router the groups that go with it.

    Args:
        layer: An MoE layer with Megatron's own dispatcher and process groups.
        dispatcher: The class to use; None for the one that `config.edp_dispatcher` names.

    Raises:
        ConfigurationError: The layer's process groups are not EDP's, or the class does not fit the configuration.
    """
    config: Any = layer.config
    stock = cast(MoETokenDispatcher, layer.token_dispatcher)
    check_edp_groups(layer.attn_tp_group, layer.ep_group, stock.tp_group)
    chosen = dispatcher or DISPATCHERS[resolve_dispatcher(config)].load().of(config)
    entry = DISPATCHERS[chosen.kind]
    if (reason := entry.unfit(config)) is not None:
        raise ConfigurationError(f"{chosen.__name__} is of the kind {entry.name!r}: {reason}")
    # The group of attention and that of the experts have the same ranks. Attention's saves a communicator, and has the
    # timeout that was asked for, which Megatron does not pass on to the expert-parallel group.
    tensor = expert_group(layer)
    # Megatron passes a class of its own here, which has another name in 0.14.
    groups = SimpleNamespace(ep=tensor, expt_tp=stock.tp_group, tp_ep=tensor)
    own = chosen(config, groups, layer.router)
    layer.token_dispatcher = own
    if config.edp_overlap:
        check_overlap(chosen)
        layer.token_dispatcher = OverlappedTokenDispatcher(own, groups, lambda *rows: layer.experts(*rows))
    if not entry.needs_sequence_parallel:
        exclude_replicas(layer.router)
        # Megatron's forward refuses to train without sequence parallelism where this group has several ranks.
        layer.attn_tp_group = stock.tp_group
    elif config.moe_capacity_scope == "edp":
        leave_dropping_to_the_dispatcher(layer.router)


def check_overlap(dispatcher: type[EdpTokenDispatcher]) -> None:
    """Refuse a class whose exchange cannot be begun in one place and ended in another.

    Raises:
        ConfigurationError: The class replaces a method that overlap does not call.
    """
    for method, instead in (("token_dispatch", "begin_dispatch"), ("token_combine", "begin_combine")):
        if getattr(dispatcher, method) is not getattr(EdpTokenDispatcher, method):
            raise ConfigurationError(
                f"edp_overlap is True, expected False with {dispatcher.__name__}: its {method} waits for what it sends;"
                f" to overlap, replace {instead} instead"
            )


def expert_group(layer: MoELayer) -> Any:
    """Return the group over which a layer dispatches: that of the device mesh, or the one that the layer was given.

    A layer is given a tensor-parallel group of its own by `pg_collection`; else it has Megatron's.
    """
    if layer.attn_tp_group is not parallel_state.get_tensor_model_parallel_group(check_initialized=False):
        return layer.attn_tp_group
    attention, _ = edp_device_meshes()
    return attention.get_group("tp")


def resolve_dispatcher(config: Any) -> str:
    """Return the name of the dispatcher. Rank 0 logs once what "auto" chooses, and the bytes that decide it."""
    options = cast(SkyworkOptions, config)
    if options.edp_dispatcher != "auto":
        return options.edp_dispatcher
    exchange = exchange_of(config)
    totals = {one.name: per_token(one.bytes_sent(exchange), exchange) for one in fitting(config)}
    name = min(totals, key=totals.__getitem__)
    _log_choice(name, tuple(totals.items()), exchange.ranks)
    return name


def exchange_of(config: Any, tokens: int = _TYPICAL_TOKENS) -> Exchange:
    """Describe the exchange of a layer with this configuration for `tokens` tokens per rank."""
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
def _log_choice(name: str, totals: tuple[tuple[str, float], ...], ranks: int) -> None:
    if torch.distributed.get_rank() == 0:
        counts = ", ".join(f"{choice} {total:,.0f}" for choice, total in totals)
        logger.info(
            f"edp_dispatcher 'auto' is '{name}': bytes a rank sends per layer and token of its own, forward and"
            f" backward, on {ranks} ranks: {counts}"
        )


def exclude_replicas(router: Any) -> None:
    """Leave the ranks that hold the same tokens out of the router's auxiliary and z-loss.

    Megatron divides both losses by the tensor-parallel size, and expects the ranks' gradients to be added up
    afterwards. It only adds them up under sequence parallelism.
    """
    router.tp_cp_group = router.cp_group
    router.tp_dp_cp_group = parallel_state.get_data_parallel_group(with_context_parallel=True)


def leave_dropping_to_the_dispatcher(router: Any) -> None:
    """Keep the router from dropping: it sees one rank's tokens, so it cannot apply a capacity of the whole group."""
    router.capacity_factor = None
