"""Names and shapes of a Megatron GPT model in `torch_dist` checkpoints, as measured on the real model. Without torch.

`local.json` is written by `generate.py` from Megatron's own `sharded_state_dict`; `te.json` (Transformer Engine's
layers) was derived from Megatron's sources and never measured. A shape is a string of symbols:

    L layers    E experts    H hidden    F MLP    V padded vocabulary    A query width    K key (or value) width
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from itertools import product
from typing import Any

from nemo_skymoe.architecture import Architecture
from nemo_skymoe.config import ConfigurationError

LAYER_SPECS = ("local", "te")
PREFIX = "module."
"""Before every name in a NeMo checkpoint; Megatron-LM's have none."""
LAYERS = "decoder.layers."
EXPERTS = "mlp.experts.experts."
HEAD = "output_layer.weight"


@dataclass(frozen=True)
class Place:
    """A stored tensor or extra state, or the slice of a stacked one that belongs to one layer or one expert."""

    name: str
    shape: tuple[int, ...]
    """Of the whole stored tensor."""
    index: tuple[int, ...]
    """Of the slice in the leading dimensions."""
    module: str
    """The name without prefix, layer and expert: `self_attention.linear_qkv.weight`."""
    layer: int | None = None
    expert: int | None = None

    @property
    def shard(self) -> str:
        """The name under which an extra state is stored: with its place among those of all layers and experts."""
        index, shape = self.index or (0,), self.shape or (1,)
        return f"{self.name}/shard_{'.'.join(map(str, index))}_{'.'.join(map(str, shape))}"


def symbols(architecture: Architecture, padded_vocab_size: int) -> dict[str, int]:
    """The value of every symbol and sum of symbols that the tables use."""
    queries = architecture.num_attention_heads * architecture.head_size
    keys = architecture.query_groups * architecture.head_size
    return {
        "L": architecture.num_layers,
        "E": architecture.num_moe_experts or 0,
        "H": architecture.hidden_size,
        "F": architecture.ffn_hidden_size,
        "2F": 2 * architecture.ffn_hidden_size,
        "V": padded_vocab_size,
        "A": queries,
        "A+2K": queries + 2 * keys,
    }


def tensors(
    architecture: Architecture,
    padded_vocab_size: int,
    layer_spec: str = "local",
    *,
    stacked: bool = True,
    prefix: str = PREFIX,
) -> Iterator[Place]:
    """Every tensor of the model, slice by slice.

    Args:
        padded_vocab_size: Rows of embedding and head as Megatron stores them.
        layer_spec: "local" or "te", whose layers the model is made of.
        stacked: One tensor [layers, ...] for all layers, or one a layer (`hetereogenous_dist_checkpoint`), as always
            where layers differ.
        prefix: Before every name.

    Raises:
        ConfigurationError: An unknown `layer_spec`.
    """
    for name, sizes, layers in _entries("tensors", architecture, layer_spec, padded_vocab_size):
        if name != HEAD or not architecture.tied_embeddings:
            yield from _places(name, sizes, architecture, layers, stacked, prefix)


def extra_states(
    architecture: Architecture, layer_spec: str = "local", *, stacked: bool = True, prefix: str = PREFIX
) -> Iterator[Place]:
    """What Megatron expects beside the tensors, one object a place: the FP8 scales of its linear layers."""
    for name, sizes, layers in _entries("extra_states", architecture, layer_spec, 0):
        yield from _places(name, sizes, architecture, layers, stacked, prefix)


def _entries(
    kind: str, architecture: Architecture, layer_spec: str, padded_vocab_size: int
) -> Iterator[tuple[str, tuple[int, ...], list[int]]]:
    """Name, shape as stacked, and layers of every entry of the tables; the layers are those that have it."""
    if layer_spec not in LAYER_SPECS:
        raise ConfigurationError(f"layer_spec is {layer_spec!r}, expected one of {', '.join(LAYER_SPECS)}")
    done: set[str] = set()
    for moe in sorted({*architecture.moe_layers}):
        values = symbols(architecture.of_layers(moe), padded_vocab_size)
        layers = [layer for layer, is_moe in enumerate(architecture.moe_layers) if is_moe == moe]
        for name, shape in load(layer_spec)["moe" if moe else "dense"][kind].items():
            if name.startswith(LAYERS) or name not in done:
                done.add(name)
                yield name, tuple(values[symbol] for symbol in shape.split()), layers


@cache
def load(layer_spec: str) -> dict[str, Any]:
    """The packaged table of `layer_spec`; "megatron_core" lists the versions it was measured on."""
    return json.loads(files(__name__).joinpath(f"{layer_spec}.json").read_text())


def _places(
    name: str,
    shape: tuple[int, ...],
    architecture: Architecture,
    layers: list[int],
    stacked: bool,
    prefix: str,
) -> Iterator[Place]:
    if not name.startswith(LAYERS):
        yield Place(prefix + name, shape, (), name)
        return
    module = name.removeprefix(LAYERS)
    experts = range(architecture.num_moe_experts or 0) if module.startswith(EXPERTS) else (None,)
    stacked = stacked and not architecture.layers_differ
    for layer, expert in product(layers, experts):
        index = (layer,) if expert is None else (layer, expert)
        if stacked:
            yield Place(prefix + name, shape, index, module, layer, expert)
        else:
            yield Place(f"{prefix}{LAYERS}{layer}.{module}", shape[1:], index[1:], module, layer, expert)
