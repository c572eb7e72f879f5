"""What the installed Megatron-Core stores of a real model, local or Transformer Engine's, beside what the table says."""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import megatron.core
import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, apply_factories

from nemo_skymoe.architecture import Architecture
from nemo_skymoe.checkpoint.description import Description
from nemo_skymoe.checkpoint.torch_dist import names as torch_dist_names
from nemo_skymoe.checkpoint.verification.gpt_model import gpt_model, one_rank

_DENSE = Architecture(5, 53, 31, 15, vocab_size=97, num_query_groups=3, kv_channels=14)
_MOE = _DENSE.with_experts(7)
_TIED = Architecture(3, 53, 31, 4, vocab_size=97, kv_channels=14, tied_embeddings=True)
EXAMPLES = {
    "dense": _DENSE,
    "moe": _MOE,
    "tied": _TIED,
    "tied moe": _TIED.with_experts(5),
    "first dense": replace(_MOE, moe_layer_freq=(0, 1, 1, 0, 1), moe_ffn_hidden_size=17),
    "every second": replace(_TIED.with_experts(5), moe_layer_freq=2),
    "biases and norms of heads": replace(_DENSE, add_qkv_bias=True, qk_layernorm=True),
    "the same as an moe": replace(_MOE, add_qkv_bias=True, qk_layernorm=True),
}
"""Models that have every line of the table between them, of sizes that cannot be taken for one another."""


@dataclass(frozen=True)
class Stored:
    """What a checkpoint has of a model."""

    tensors: Mapping[str, tuple[int, ...]]
    """The shape of each tensor by name."""
    extra_states: frozenset[str]
    """The names of the objects beside them."""


def stored_by_megatron(
    architecture: Architecture, layer_spec: str = "local", *, stacked: bool = True
) -> Stored:
    """Return what the installed Megatron-Core stores of a model, which is built for that on one rank, on the CPU.

    Args:
        layer_spec: "local", or "te" where Transformer Engine can be imported.
        stacked: Whether equal layers are stacked.
    """
    # Transformer Engine's layers copy their initial weights, which a tensor without memory does not have.
    device = torch.device("meta") if layer_spec == "local" else nullcontext()
    with one_rank():
        with device:
            model = gpt_model(Description(architecture), architecture.vocab_size, layer_spec, stacked=stacked)
        state: dict[str, Any] = model.sharded_state_dict(prefix=torch_dist_names.PREFIX)
    apply_factories(state)
    parts = [*nested_values(state)]
    objects = [part.unique_key for part in parts if isinstance(part, ShardedObject)]
    assert len(objects) == len({*objects})
    return Stored(
        {part.key: tuple(part.global_shape) for part in parts if isinstance(part, ShardedTensor)},
        frozenset(objects),
    )


def stored_by_table(
    architecture: Architecture,
    layer_spec: str = "local",
    *,
    stacked: bool = True,
    megatron_core: str | None = None,
) -> Stored:
    """Return what the table says that a version of Megatron-Core stores of a model; None is the installed one."""
    version = megatron.core.__version__ if megatron_core is None else megatron_core
    chunks = torch_dist_names.chunks(architecture, architecture.vocab_size, layer_spec, stacked=stacked)
    listed = torch_dist_names.extra_states(architecture, layer_spec, stacked=stacked, megatron_core=version)
    return Stored({chunk.tensor: chunk.shape for chunk in chunks}, frozenset(listed))


def differences(layer_spec: str) -> list[str]:
    """Return a sentence for every difference between the table and the installed Megatron-Core's real models.

    Args:
        layer_spec: "local", or "te" where Transformer Engine can be imported.
    """
    return [
        f"{name}, {'stacked' if stacked else 'layer by layer'}: {said}"
        for name, architecture in EXAMPLES.items()
        for stacked in (True, False)
        for said in compared(
            stored_by_megatron(architecture, layer_spec, stacked=stacked),
            stored_by_table(architecture, layer_spec, stacked=stacked),
        )
    ]


def compared(real: Stored, table: Stored) -> list[str]:
    """Return a sentence for every tensor or extra state in which the table is wrong about the real model."""
    entries, found = ({**one.tensors, **dict.fromkeys(one.extra_states)} for one in (table, real))
    return [
        *(f"the table has '{name}', the model has not" for name in sorted(entries.keys() - found.keys())),
        *(f"the model has '{name}', the table has not" for name in sorted(found.keys() - entries.keys())),
        *(
            f"'{name}' is {[*(found[name] or ())]} in the model, {[*(entries[name] or ())]} in the table"
            for name in sorted(entries.keys() & found.keys())
            if entries[name] != found[name]
        ),
    ]
