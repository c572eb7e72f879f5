"""Every checkpoint format here shares these types: a model's tensors by what they mean, and a folder's by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from nemo_skymoe.architecture import Architecture

if TYPE_CHECKING:  # a --dry-run has less time than importing torch takes
    from torch import Tensor

ATTENTION_KINDS = ("attention_norm", "query", "key", "value", "attention_output", "mlp_norm")
BIAS_KINDS = ("query_bias", "key_bias", "value_bias")
HEAD_NORM_KINDS = ("query_norm", "key_norm")
MLP_KINDS = ("gate", "up", "down")
ITEM_SIZES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8, "float8_e4m3fn": 1, "float8_e5m2": 1}
"""Bytes of an element, by torch's name of the data type: all that weights may be stored in."""


@dataclass(frozen=True, order=True)
class Key:
    """One matrix or vector of a decoder, whatever a format calls it and however it fuses or stacks it.

    Matrices are [out, in]: `query`, `key`, `value` and `attention_output`, `gate`, `up` and `down` of the SwiGLU
    MLP or of one expert, `router` [experts, hidden], `embedding` and `output` [vocabulary, hidden]; all others are
    vectors: three norms, the biases of queries, keys and values, and the norms of queries and keys.
    """

    kind: str
    layer: int | None = None
    expert: int | None = None

    def __str__(self) -> str:
        place = "" if self.layer is None else f" of layer {self.layer}"
        return f"{self.kind}{place}" + ("" if self.expert is None else f", expert {self.expert}")


@dataclass(frozen=True)
class TensorInfo:
    """Shape and data type of a stored tensor. `dtype` is torch's name of it: "bfloat16", "float32"."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def bytes(self) -> int:
        """Size without padding or headers."""
        return prod(self.shape) * ITEM_SIZES[self.dtype]


class Storage(Protocol):
    """The named tensors of a checkpoint folder, read region by region and never mapped into memory."""

    folder: Path

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor of the model, from headers or metadata alone."""
        ...

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold them, for checksums."""
        ...

    def read(self, name: str, index: tuple[int, ...] = (), rows: tuple[int, int] | None = None) -> Tensor:
        """Part of a tensor: `index` picks from the leading dimensions, `rows` a range of the next one."""
        ...


class Weights(Protocol):
    """A model's tensors by meaning: a checkpoint of any format, or one that is computed while it is read."""

    architecture: Architecture

    def keys(self) -> tuple[Key, ...]:
        """Return every tensor of the model, in the order of the layers."""
        ...

    def info(self, key: Key) -> TensorInfo:
        """Shape and data type, without reading."""
        ...

    def read(self, key: Key) -> Tensor:
        """Return the whole tensor, contiguous, the caller's own."""
        ...


def model_keys(architecture: Architecture) -> tuple[Key, ...]:
    """Return every tensor that a model of this architecture has, in the order of the layers."""
    keys = [Key("embedding")]
    for layer, moe in enumerate(architecture.moe_layers):
        keys += [Key(kind, layer) for kind in attention_kinds(architecture)]
        if not moe:
            keys += [Key(kind, layer) for kind in MLP_KINDS]
        else:
            keys.append(Key("router", layer))
            experts = range(architecture.num_moe_experts or 0)
            keys += [Key(kind, layer, expert) for expert in experts for kind in MLP_KINDS]
    keys.append(Key("final_norm"))
    return tuple(keys) if architecture.tied_embeddings else (*keys, Key("output"))


def attention_kinds(architecture: Architecture) -> tuple[str, ...]:
    """Return the kinds of tensors that a layer has beside its MLP."""
    return (
        *ATTENTION_KINDS,
        *(BIAS_KINDS if architecture.add_qkv_bias else ()),
        *(HEAD_NORM_KINDS if architecture.qk_layernorm else ()),
    )


def key_shape(architecture: Architecture, key: Key) -> tuple[int, ...]:
    """Return the shape that a tensor has in a model of this architecture."""
    hidden = architecture.hidden_size
    ffn = architecture.ffn_hidden_size if key.expert is None else architecture.expert_ffn_hidden_size
    queries = architecture.num_attention_heads * architecture.head_size
    keys_or_values = architecture.query_groups * architecture.head_size
    shapes = {
        "embedding": (architecture.vocab_size, hidden),
        "output": (architecture.vocab_size, hidden),
        "query": (queries, hidden),
        "key": (keys_or_values, hidden),
        "value": (keys_or_values, hidden),
        "attention_output": (hidden, queries),
        "router": (architecture.num_moe_experts or 0, hidden),
        "gate": (ffn, hidden),
        "up": (ffn, hidden),
        "down": (hidden, ffn),
        "query_bias": (queries,),
        "key_bias": (keys_or_values,),
        "value_bias": (keys_or_values,),
        "query_norm": (architecture.head_size,),
        "key_norm": (architecture.head_size,),
    }
    return shapes.get(key.kind, (hidden,))
