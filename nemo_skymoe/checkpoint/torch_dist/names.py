"""Megatron's names in `torch_dist` checkpoints, and what each stored tensor is made of. Without torch.

The names and shapes of Megatron's own layers ("local") and of Transformer Engine's ("te") were measured on the real model of
each version in `MEASURED`, by `nemo_skymoe/checkpoint/verification/measured_names.py`; those of Transformer Engine 2.20.2 are
kept in `tests/checkpoint/torch_dist/transformer_engine.json`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from nemo_skymoe.architecture import Architecture
from nemo_skymoe.checkpoint.tensors.mapping import Chunk, Part
from nemo_skymoe.checkpoint.tensors.model import Key, Storage
from nemo_skymoe.checkpoint.tensors.table import Arrangement, Line, below, entries, shape_of
from nemo_skymoe.durable.errors import CheckpointError, ConfigurationError

LAYER_SPECS = ("local", "te")
MEASURED = ("0.14.0", "0.15.3", "0.16.1", "0.17.1", "0.18.2", "0.19.2")
"""The versions of Megatron-Core whose names the table has."""
PREFIX = "module."
"""Every name in a NeMo checkpoint begins with it; Megatron-LM's have no prefix."""
EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"
_PADDED = ("embedding", "output")


def by_query_group(query: str, key: str, value: str) -> Arrangement:
    """Return the arrangement of the query heads of a group, its key and its value, group by group."""

    def parts(architecture: Architecture, layer: int | None, _: int | None) -> Iterator[Part]:
        size, groups = architecture.head_size, architecture.query_groups
        queries = architecture.num_attention_heads // groups * size
        for group in range(groups):
            for kind, rows in ((query, queries), (key, size), (value, size)):
                yield Part(Key(kind, layer), group * rows, (group + 1) * rows)

    return parts


# The lines of a layer stand in the order of the alphabet, in which their files are numbered.
TABLE = (
    Line(EMBEDDING, "embedding"),
    Line("decoder.layers.{layer}.mlp.experts.experts.{expert}.linear_fc1.weight", below("gate", "up"), "moe"),
    Line("decoder.layers.{layer}.mlp.experts.experts.{expert}.linear_fc2.weight", "down", "moe"),
    Line("decoder.layers.{layer}.mlp.linear_fc1.layer_norm_weight", "mlp_norm", "dense"),
    Line("decoder.layers.{layer}.mlp.linear_fc1.layer_norm_weight", "mlp_norm", "moe local"),
    Line("decoder.layers.{layer}.mlp.linear_fc1.weight", below("gate", "up"), "dense"),
    Line("decoder.layers.{layer}.mlp.linear_fc2.weight", "down", "dense"),
    Line("decoder.layers.{layer}.mlp.router.weight", "router", "moe"),
    Line("decoder.layers.{layer}.pre_mlp_layernorm.weight", "mlp_norm", "moe te"),
    Line("decoder.layers.{layer}.self_attention.k_layernorm.weight", "key_norm", "qk_layernorm"),
    Line("decoder.layers.{layer}.self_attention.linear_proj.weight", "attention_output"),
    Line(
        "decoder.layers.{layer}.self_attention.linear_qkv.bias",
        by_query_group("query_bias", "key_bias", "value_bias"),
        "add_qkv_bias",
    ),
    Line("decoder.layers.{layer}.self_attention.linear_qkv.layer_norm_weight", "attention_norm"),
    Line("decoder.layers.{layer}.self_attention.linear_qkv.weight", by_query_group("query", "key", "value")),
    Line("decoder.layers.{layer}.self_attention.q_layernorm.weight", "query_norm", "qk_layernorm"),
    Line("decoder.final_layernorm.weight", "final_norm"),
    Line(HEAD, "output"),
)
EXTRA_STATES = (
    Line("decoder.layers.{layer}.mlp.experts.experts.{expert}.linear_fc1._extra_state", where="moe"),
    Line("decoder.layers.{layer}.mlp.experts.experts.{expert}.linear_fc2._extra_state", where="moe"),
    Line("decoder.layers.{layer}.mlp.linear_fc1._extra_state", where="dense"),
    Line("decoder.layers.{layer}.mlp.linear_fc2._extra_state", where="dense"),
    Line("decoder.layers.{layer}.pre_mlp_layernorm._extra_state", where="moe te"),
    Line("decoder.layers.{layer}.self_attention.core_attention._extra_state", where="te"),
    Line("decoder.layers.{layer}.self_attention.k_layernorm._extra_state", where="te qk_layernorm"),
    Line("decoder.layers.{layer}.self_attention.linear_proj._extra_state"),
    Line("decoder.layers.{layer}.self_attention.linear_qkv._extra_state"),
    Line("decoder.layers.{layer}.self_attention.q_layernorm._extra_state", where="te qk_layernorm"),
    Line("decoder.final_layernorm._extra_state", where="te"),
)
"""Megatron expects these beside the tensors, an empty object for each: the FP8 scales of its linear layers."""
_ONLY_IN_0_14 = ".core_attention._extra_state"


def padded_vocab_size(vocab_size: int, multiple: int = 128) -> int:
    """Return the rows that NeMo gives embedding and head, a multiple of `make_vocab_size_divisible_by` x TP."""
    return -(-vocab_size // multiple) * multiple


def chunks(
    architecture: Architecture,
    padded_vocab_size: int,
    layer_spec: str = "local",
    *,
    stacked: bool = True,
    prefix: str = PREFIX,
) -> list[Chunk]:
    """Return the chunks of a checkpoint of this architecture: one per layer, or per layer and expert, in their order.

    Experts are stored alike whether they run grouped or one after another.

    Args:
        padded_vocab_size: Rows of embedding and head as Megatron stores them.
        layer_spec: "local" or "te", whose layers the model is made of.
        stacked: One tensor [layers, ...] for all layers, or one a layer (`hetereogenous_dist_checkpoint`), as always
            where layers differ.
        prefix: The beginning of every name.

    Raises:
        ConfigurationError: The vocabulary does not fit into `padded_vocab_size`, or an unknown `layer_spec`.
    """
    padding = padded_vocab_size - architecture.vocab_size
    if padding < 0:
        raise ConfigurationError(
            f"padded_vocab_size is {padded_vocab_size}, expected at least vocab_size ({architecture.vocab_size})"
        )
    found = []
    for line, place in _places(TABLE, architecture, layer_spec, stacked, prefix):
        parts = line.parts(architecture, place.layer, place.expert)
        if padding and line.meaning in _PADDED:
            parts = (*parts, Part(None, 0, padding))
        shape = (*place.stacked, *shape_of(architecture, parts))
        found.append(Chunk(place.name, shape, parts, place.index))
    return found


def extra_states(
    architecture: Architecture,
    layer_spec: str = "local",
    *,
    stacked: bool = True,
    prefix: str = PREFIX,
    megatron_core: str | None = None,
) -> list[str]:
    """Return the stored names of the objects that Megatron looks for beside the tensors. All of them are empty.

    Args:
        megatron_core: The version that looks for them. None returns those of every version, as a checkpoint has to
            have them that every version loads: Megatron ignores an object too many, and fails where one is missing.
    """
    newer = megatron_core is not None and not megatron_core.startswith("0.14.")
    return [
        place.shard
        for line, place in _places(EXTRA_STATES, architecture, layer_spec, stacked, prefix)
        if not (newer and line.name.endswith(_ONLY_IN_0_14))
    ]


@dataclass(frozen=True)
class _Place:
    """The place of what belongs to a layer and an expert: a name, and a slice of what has that name."""

    name: str
    stacked: tuple[int, ...]
    """The numbers of layers and experts that share the name; they are the leading dimensions."""
    index: tuple[int, ...]
    """The layer and the expert among them."""
    layer: int | None
    expert: int | None

    @property
    def shard(self) -> str:
        """Return the name under which an extra state is stored."""
        index, stacked = (
            ".".join(map(str, numbers)) for numbers in (self.index or (0,), self.stacked or (1,))
        )
        return f"{self.name}/shard_{index}_{stacked}"


def _places(
    table: tuple[Line, ...], architecture: Architecture, layer_spec: str, stacked: bool, prefix: str
) -> Iterator[tuple[Line, _Place]]:
    if layer_spec not in LAYER_SPECS:
        raise ConfigurationError(f"layer_spec is {layer_spec!r}, expected one of {', '.join(LAYER_SPECS)}")
    stacked = stacked and not architecture.layers_differ
    for line, layer, expert in entries(table, architecture, layer_spec):
        name, sizes, index = prefix + line.name, (), ()
        if layer is not None and stacked:
            name, sizes, index = name.replace("{layer}.", ""), (architecture.num_layers,), (layer,)
        if expert is not None:
            assert architecture.num_moe_experts is not None
            name = name.replace("{expert}.", "")
            sizes, index = (*sizes, architecture.num_moe_experts), (*index, expert)
        yield line, _Place(name.format(layer=layer), sizes, index, layer, expert)


@dataclass(frozen=True)
class Layout:
    """The way a model was saved, as the arguments of `chunks`."""

    padded_vocab_size: int
    layer_spec: str = "local"
    stacked: bool = True
    prefix: str = PREFIX


def layout(storage: Storage) -> Layout:
    """Return the way the model in `storage` was saved, as its names tell it.

    Raises:
        CheckpointError: It has no embedding of Megatron's.
    """
    names = storage.tensors.keys()
    adapter = next((name for name in sorted(names) if ".adapter." in name), None)
    if adapter is not None:
        raise CheckpointError(
            f"'{adapter}' in '{storage.folder}' belongs to an adapter (LoRA), which is not a model: merge it into its base"
            " with nemo.collections.llm.peft.merge_lora, or AutoBridge's export_adapter_ckpt and peft, and give the result"
        )
    prefix = PREFIX if any(name.startswith(PREFIX) for name in names) else ""
    # Where both are tied, either may be the one that was saved.
    embedding = next((prefix + name for name in (EMBEDDING, HEAD) if prefix + name in names), None)
    if embedding is None:
        raise CheckpointError(
            f"'{storage.folder}' has no '{prefix + EMBEDDING}': expected a Megatron GPT model"
        )
    return Layout(
        storage.tensors[embedding].shape[0],
        layer_spec="te" if any("pre_mlp_layernorm" in name for name in names) else "local",
        stacked=not any(re.search(r"decoder\.layers\.\d", name) for name in names),
        prefix=prefix,
    )
