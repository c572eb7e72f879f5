"""A format's table: on every line a name that the format has, and beside it what that tensor means."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from nemo_skymoe.architecture import Architecture
from nemo_skymoe.checkpoint.tensors.mapping import Part
from nemo_skymoe.checkpoint.tensors.model import Key, key_shape

Arrangement = Callable[[Architecture, int | None, int | None], Iterator[Part]]
"""The rows of a stored tensor that is made of several, for a layer and an expert."""

_OPTIONS = ("add_qkv_bias", "qk_layernorm")


@dataclass(frozen=True)
class Line:
    """A family of tensors: one for the model, one for every layer, or one for every expert."""

    name: str
    """The format's name, with {layer} and {expert} where there is one for each."""
    meaning: str | Arrangement = ""
    """A kind of `tensors.Key`, or what arranges the rows of several; empty for what is no tensor of the model."""
    where: str = ""
    """The words that have to hold, empty for everywhere: "dense" or "moe" of the layer, the variant of the format, and
    "add_qkv_bias" or "qk_layernorm" of the model."""

    def parts(self, architecture: Architecture, layer: int | None, expert: int | None) -> tuple[Part, ...]:
        """Return the parts that the tensor of this layer and this expert is made of."""
        arrangement = below(self.meaning) if isinstance(self.meaning, str) else self.meaning
        return tuple(arrangement(architecture, layer, expert))


def below(*kinds: str) -> Arrangement:
    """Whole tensors, each below the one before it."""

    def parts(architecture: Architecture, layer: int | None, expert: int | None) -> Iterator[Part]:
        for kind in kinds:
            key = Key(kind, layer, expert)
            yield Part(key, 0, key_shape(architecture, key)[0])

    return parts


def entries(
    table: Sequence[Line], architecture: Architecture, variant: str
) -> Iterator[tuple[Line, int | None, int | None]]:
    """Yield the lines that a model has, each with its layer and expert, layer by layer and in the table's order."""
    words = {variant, *(option for option in _OPTIONS if getattr(architecture, option))}
    for of_layers, group in groupby(table, lambda line: "{layer}" in line.name):
        lines = [line for line in group if not (architecture.tied_embeddings and line.meaning == "output")]
        if of_layers:
            for layer, moe in enumerate(architecture.moe_layers):
                experts = range(architecture.num_moe_experts or 0) if moe else ()
                yield from _of_layer(_found(lines, {*words, "moe" if moe else "dense"}), layer, experts)
        else:
            yield from ((line, None, None) for line in _found(lines, words))


def _found(lines: Sequence[Line], words: set[str]) -> list[Line]:
    return [line for line in lines if words.issuperset(line.where.split())]


def _of_layer(
    lines: Sequence[Line], layer: int, experts: Sequence[int]
) -> Iterator[tuple[Line, int, int | None]]:
    yield from ((line, layer, None) for line in lines if "{expert}" not in line.name)
    for expert in experts:
        yield from ((line, layer, expert) for line in lines if "{expert}" in line.name)


def shape_of(architecture: Architecture, parts: Sequence[Part]) -> tuple[int, ...]:
    """Return the shape of parts that lie below each other, the first of which is no padding."""
    assert parts[0].key is not None
    rows = sum(part.stop - part.start for part in parts)
    return rows, *key_shape(architecture, parts[0].key)[1:]
