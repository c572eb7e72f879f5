"""The table of EDP's token dispatchers. Checks, the choice of "auto", the layer and the documentation follow from it.

It holds plain values and does not need torch: a class is named, and imported when a layer is built.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nemo_skymoe import gpus, traffic
from nemo_skymoe.traffic import Exchange, Traffic


@dataclass(frozen=True)
class Dispatcher:
    """One way to bring tokens to the ranks of their experts, and the results back."""

    name: str
    """The value of `edp_dispatcher`."""
    target: str
    """The dispatcher's class, written "module:name"."""
    bytes_sent: Callable[[Exchange], Traffic]
    """Returns the bytes that a rank sends in one layer, see `traffic`."""
    needs_sequence_parallel: bool
    """True if every rank holds its own tokens, False if all ranks hold the same ones."""
    sees_the_group: bool
    """True if a rank sees all tokens of the group, which `moe_capacity_scope="edp"` needs."""
    splits_padding: bool
    """True if experts padded to their capacity can take a micro-batch in two halves, which `edp_overlap` needs."""
    moves: str
    """What travels in the forward pass, in words."""

    def load(self) -> type:
        """Import and return the class, which imports torch."""
        module, _, name = self.target.partition(":")
        return getattr(importlib.import_module(module), name)

    def unfit(self, config: Any) -> str | None:
        """Return a sentence on why the dispatcher cannot run under a configuration, or None if it can."""
        split = config.sequence_parallel
        if config.tensor_model_parallel_size > 1 and split != self.needs_sequence_parallel:
            return (
                f"edp_dispatcher={self.name!r} needs sequence_parallel={self.needs_sequence_parallel}: without sequence"
                " parallelism every rank holds the tokens already"
                f" ({_names(needs_sequence_parallel=False)}), with it each holds its own"
                f" ({_names(needs_sequence_parallel=True)})"
            )
        if config.moe_capacity_scope == "edp" and not self.sees_the_group:
            return (
                "moe_capacity_scope='edp' needs every rank to see the whole group's tokens, which"
                f" edp_dispatcher={self.name!r} avoids: expected {_names(sees_the_group=True)} or 'auto', or"
                " moe_capacity_scope='rank'"
            )
        if config.edp_overlap and config.moe_pad_expert_input_to_capacity and not self.splits_padding:
            return (
                f"edp_overlap=True with edp_dispatcher={self.name!r} would need the places of a padded expert twice:"
                f" expected moe_pad_expert_input_to_capacity=False, or {_names(splits_padding=True)} with"
                " sequence_parallel=True"
            )
        return None


_ALL = (
    Dispatcher(
        name="replicated",
        target="nemo_skymoe.moe.dispatch_replicated:ReplicatedTokenDispatcher",
        bytes_sent=traffic.replicated,
        needs_sequence_parallel=False,
        sees_the_group=True,
        splits_padding=False,
        moves="nothing to the experts; one all-reduce of their outputs",
    ),
    Dispatcher(
        name="alltoall",
        target="nemo_skymoe.moe.dispatch_alltoall:AllToAllTokenDispatcher",
        bytes_sent=traffic.alltoall,
        needs_sequence_parallel=True,
        sees_the_group=False,
        splits_padding=True,
        moves="a row for every rank that has an expert of the token, there and back",
    ),
    Dispatcher(
        name="allgather",
        target="nemo_skymoe.moe.dispatch_allgather:AllGatherTokenDispatcher",
        bytes_sent=traffic.allgather,
        needs_sequence_parallel=True,
        sees_the_group=True,
        splits_padding=False,
        moves="every token to every rank; one reduce-scatter of the outputs",
    ),
)
DISPATCHERS = {dispatcher.name: dispatcher for dispatcher in _ALL}
"""The dispatchers by name. Of two that send as many bytes, "auto" takes the first."""


def fitting(config: Any) -> list[Dispatcher]:
    """Return the dispatchers among which "auto" chooses."""
    split = config.sequence_parallel
    return [one for one in _ALL if one.needs_sequence_parallel == split and one.unfit(config) is None]


def megatron_dispatcher() -> str:
    """Return the default `moe_token_dispatcher_type`, which is used where `moe_edp` is off: gloo has no all-to-all."""
    return "alltoall" if gpus.in_use() else "allgather"


def _names(**having: bool) -> str:
    found = [one.name for one in _ALL if all(getattr(one, name) == value for name, value in having.items())]
    return " or ".join(map(repr, found))
