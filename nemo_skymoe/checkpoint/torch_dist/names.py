"""Megatron's names: what each tensor that is stored in a `torch_dist` checkpoint is made of."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from nemo_skymoe.architecture import Architecture
from nemo_skymoe.checkpoint.mapping import Chunk, Part, whole
from nemo_skymoe.checkpoint.tensors import Key, Storage
from nemo_skymoe.checkpoint.torch_dist import tables
from nemo_skymoe.checkpoint.torch_dist.tables import PREFIX, Place
from nemo_skymoe.config import ConfigurationError

EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"


def padded_vocab_size(vocab_size: int, multiple: int = 128) -> int:
    """The rows that NeMo gives embedding and head: `make_vocab_size_divisible_by` times the tensor-parallel size."""
    return -(-vocab_size // multiple) * multiple


def chunks(
    architecture: Architecture,
    padded_vocab_size: int,
    layer_spec: str = "local",
    *,
    stacked: bool = True,
    prefix: str = PREFIX,
) -> list[Chunk]:
    """What a checkpoint of this architecture holds: a chunk for each layer, or each layer and expert, in their order.

    Arguments are those of `tables.tensors`. Experts are stored alike whether they run grouped or one after another.

    Raises:
        ConfigurationError: The vocabulary does not fit into `padded_vocab_size`, or an unknown `layer_spec`.
    """
    if padded_vocab_size < architecture.vocab_size:
        raise ConfigurationError(
            f"padded_vocab_size is {padded_vocab_size}, expected at least vocab_size ({architecture.vocab_size})"
        )
    places = tables.tensors(architecture, padded_vocab_size, layer_spec, stacked=stacked, prefix=prefix)
    return [
        Chunk(place.name, place.shape, tuple(_PARTS[place.module](place, architecture)), place.index)
        for place in sorted(places, key=_order)
    ]


def extra_states(
    architecture: Architecture, layer_spec: str = "local", *, stacked: bool = True, prefix: str = PREFIX
) -> list[str]:
    """The stored names of the objects that Megatron looks for beside the tensors; all of them are empty."""
    places = tables.extra_states(architecture, layer_spec, stacked=stacked, prefix=prefix)
    return [place.shard for place in sorted(places, key=_order)]


@dataclass(frozen=True)
class Layout:
    """How a model was saved: the arguments of `chunks`."""

    padded_vocab_size: int
    layer_spec: str = "local"
    stacked: bool = True
    prefix: str = PREFIX


def layout(storage: Storage) -> Layout:
    """How the model in `storage` was saved, by its names.

    Raises:
        ConfigurationError: It has no embedding of Megatron's.
    """
    names = storage.tensors.keys()
    adapter = next((name for name in sorted(names) if ".adapter." in name), None)
    if adapter is not None:
        raise ConfigurationError(
            f"'{adapter}' in '{storage.folder}' belongs to an adapter (LoRA) of NeMo, which is not a model: merge it into its"
            " base with nemo.collections.llm.peft.merge_lora, and give the result"
        )
    prefix = PREFIX if any(name.startswith(PREFIX) for name in names) else ""
    # Where both are tied, either may be the one that was saved.
    embedding = next((prefix + name for name in (EMBEDDING, HEAD) if prefix + name in names), None)
    if embedding is None:
        raise ConfigurationError(
            f"'{storage.folder}' has no '{prefix + EMBEDDING}': expected a Megatron GPT model"
        )
    return Layout(
        storage.tensors[embedding].shape[0],
        layer_spec="te" if any("pre_mlp_layernorm" in name for name in names) else "local",
        stacked=not any(re.search(r"decoder\.layers\.\d", name) for name in names),
        prefix=prefix,
    )


def _order(place: Place) -> tuple[bool, int, int]:
    """Embedding, layers, final norm and head."""
    first = place.module == EMBEDDING
    after = place.layer is None and not first
    return after, -1 if place.layer is None else place.layer, -1 if place.expert is None else place.expert


def _whole(kind: str) -> Callable[[Place, Architecture], Iterator[Part]]:
    def parts(place: Place, architecture: Architecture) -> Iterator[Part]:
        yield from whole(Key(kind, place.layer, place.expert), place.shape[len(place.index)])

    return parts


def _padded(kind: str) -> Callable[[Place, Architecture], Iterator[Part]]:
    def parts(place: Place, architecture: Architecture) -> Iterator[Part]:
        yield Part(Key(kind), 0, architecture.vocab_size)
        if place.shape[0] > architecture.vocab_size:
            yield Part(None, 0, place.shape[0] - architecture.vocab_size)

    return parts


def _query_key_value(place: Place, architecture: Architecture) -> Iterator[Part]:
    """The query heads of a group, its key and its value, group by group."""
    size, groups = architecture.head_size, architecture.query_groups
    queries = architecture.num_attention_heads // groups * size
    for group in range(groups):
        for kind, rows in (("query", queries), ("key", size), ("value", size)):
            yield Part(Key(kind, place.layer), group * rows, (group + 1) * rows)


def _gate_up(place: Place, architecture: Architecture) -> Iterator[Part]:
    """However many ranks saved it, the stored matrix is the whole gate over the whole up projection."""
    for kind in ("gate", "up"):
        yield Part(Key(kind, place.layer, place.expert), 0, place.shape[-2] // 2)


_PARTS: dict[str, Callable[[Place, Architecture], Iterator[Part]]] = {
    EMBEDDING: _padded("embedding"),
    "self_attention.linear_qkv.layer_norm_weight": _whole("attention_norm"),
    "self_attention.linear_qkv.weight": _query_key_value,
    "self_attention.linear_proj.weight": _whole("attention_output"),
    "mlp.linear_fc1.layer_norm_weight": _whole("mlp_norm"),
    "pre_mlp_layernorm.weight": _whole("mlp_norm"),
    "mlp.router.weight": _whole("router"),
    "mlp.linear_fc1.weight": _gate_up,
    "mlp.linear_fc2.weight": _whole("down"),
    "mlp.experts.experts.linear_fc1.weight": _gate_up,
    "mlp.experts.experts.linear_fc2.weight": _whole("down"),
    "decoder.final_layernorm.weight": _whole("final_norm"),
    HEAD: _padded("output"),
}
