"""The sizes of a Llama-like decoder, dense or MoE, and the numbers that follow from them, without any framework."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

from nemo_skymoe.config import ConfigurationError


@dataclass(frozen=True)
class Architecture:
    """A decoder with RMSNorm, RoPE and SwiGLU: Llama, Mistral, Qwen, Skywork-13B or Skywork-MoE (Table 2).

    Sizes are in elements; `vocab_size` counts the rows of the embedding as stored, without padding.
    """

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    vocab_size: int
    num_query_groups: int | None = None
    """Key-value heads. None means one for every attention head."""
    kv_channels: int | None = None
    """Size of a head. None means hidden_size / num_attention_heads."""
    num_moe_experts: int | None = None
    """Experts of an MoE layer. None means a dense model."""
    moe_router_topk: int = 2
    tied_embeddings: bool = False
    moe_layer_freq: int | tuple[int, ...] = 1
    """The layers that are MoE layers, in Megatron's form. A number n means every n-th layer from the first on. A tuple
    has 1 for every MoE layer and 0 for every dense one. It is kept as 1 if all layers are alike, and layer by layer
    otherwise."""
    moe_ffn_hidden_size: int | None = None
    """Size of an expert. None means `ffn_hidden_size`, the size of the MLP of dense layers."""
    add_qkv_bias: bool = False
    """Whether the projections to queries, keys and values have biases, as in Qwen2. No other layer has any."""
    qk_layernorm: bool = False
    """Whether an RMSNorm of a head's size follows the projections to queries and to keys, as in Qwen3."""

    def __post_init__(self) -> None:
        for name in ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "vocab_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ConfigurationError(f"{name} is {value!r}, expected a positive integer")
        if self.num_attention_heads % self.query_groups:
            raise ConfigurationError(
                f"num_query_groups is {self.num_query_groups}, expected a divisor of num_attention_heads"
                f" ({self.num_attention_heads})"
            )
        if self.kv_channels is None and self.hidden_size % self.num_attention_heads:
            raise ConfigurationError(
                f"hidden_size is {self.hidden_size}, expected a multiple of num_attention_heads"
                f" ({self.num_attention_heads}), or kv_channels"
            )
        experts = self.num_moe_experts
        if experts is not None and not 1 <= self.moe_router_topk <= experts:
            raise ConfigurationError(
                f"moe_router_topk is {self.moe_router_topk}, expected 1 to num_moe_experts ({experts})"
            )
        self._settle_layers()

    def _settle_layers(self) -> None:
        """Write every model in one way, so that equal models compare equal."""
        experts, size = self.num_moe_experts is not None, self.moe_ffn_hidden_size
        if size is not None and (not isinstance(size, int) or size < 1):
            raise ConfigurationError(f"moe_ffn_hidden_size is {size!r}, expected a positive integer")
        pattern = layer_pattern(self.moe_layer_freq, self.num_layers) if experts else (1,)
        if all(pattern):
            object.__setattr__(self, "moe_layer_freq", 1)
            object.__setattr__(self, "ffn_hidden_size", (size if experts else None) or self.ffn_hidden_size)
        else:
            object.__setattr__(self, "moe_layer_freq", pattern)
        if all(pattern) or size == self.ffn_hidden_size:
            object.__setattr__(self, "moe_ffn_hidden_size", None)

    @cached_property
    def moe_layers(self) -> tuple[bool, ...]:
        """For every layer, whether it is an MoE layer."""
        if self.num_moe_experts is None:
            return (False,) * self.num_layers
        return tuple(map(bool, layer_pattern(self.moe_layer_freq, self.num_layers)))

    @property
    def layers_differ(self) -> bool:
        """Whether some layers are dense and others MoE."""
        return len({*self.moe_layers}) > 1

    @property
    def expert_ffn_hidden_size(self) -> int:
        """Size of an expert, or of the MLP in a dense model."""
        return self.moe_ffn_hidden_size or self.ffn_hidden_size

    def of_layers(self, moe: bool) -> "Architecture":
        """Return the model whose layers are all like this one's MoE layers, or all like its dense ones."""
        if not moe:
            return replace(self, num_moe_experts=None)
        return replace(self, moe_layer_freq=1, ffn_hidden_size=self.expert_ffn_hidden_size)

    @property
    def layers(self) -> "tuple[Architecture, ...]":
        """For every layer, the result of `of_layers`."""
        kinds = {moe: self.of_layers(moe) for moe in {*self.moe_layers}}
        return tuple(kinds[moe] for moe in self.moe_layers)

    @property
    def query_groups(self) -> int:
        """Number of key-value heads."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def head_size(self) -> int:
        """Size of a head, in elements."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def attention_parameters(self) -> int:
        """Number of weights in one layer's four projections."""
        heads = 2 * self.num_attention_heads + 2 * self.query_groups
        return heads * self.head_size * self.hidden_size

    @property
    def attention_vectors(self) -> int:
        """Number of weights in the biases, and in the norms of queries and keys, of one layer."""
        biases = (self.num_attention_heads + 2 * self.query_groups) * self.head_size
        return biases * self.add_qkv_bias + 2 * self.head_size * self.qk_layernorm

    @property
    def expert_parameters(self) -> int:
        """Number of weights of one expert, or of one MLP in a dense model."""
        return 3 * self.hidden_size * self.expert_ffn_hidden_size

    @property
    def router_parameters(self) -> int:
        """Number of weights of one MoE layer's router, 0 in a dense model."""
        return (self.num_moe_experts or 0) * self.hidden_size

    @property
    def embedding_parameters(self) -> int:
        """Number of weights of embedding and output layer."""
        return (1 if self.tied_embeddings else 2) * self.vocab_size * self.hidden_size

    @property
    def parameters(self) -> int:
        """Number of all weights: 146,356,167,168 for Skywork-MoE at its vocabulary of 65,536."""
        return self._parameters(self.num_moe_experts or 1)

    @property
    def activated_parameters(self) -> int:
        """Number of weights that one token meets, both embeddings included."""
        return self._parameters(self.moe_router_topk if self.num_moe_experts else 1)

    def _parameters(self, experts: int) -> int:
        mlp = {
            True: experts * self.expert_parameters + self.router_parameters,
            False: 3 * self.hidden_size * self.ffn_hidden_size,
        }
        vectors = 2 * self.hidden_size + self.attention_vectors
        layers = sum(self.attention_parameters + mlp[moe] + vectors for moe in self.moe_layers)
        return layers + self.embedding_parameters + self.hidden_size

    def megatron_sizes(self) -> dict[str, Any]:
        """Return the sizes of layers and heads, and what attention has beside its matrices, as Megatron's options."""
        return {
            "num_layers": self.num_layers,
            "hidden_size": self.hidden_size,
            "ffn_hidden_size": self.ffn_hidden_size,
            "num_attention_heads": self.num_attention_heads,
            "num_query_groups": self.query_groups,
            "kv_channels": self.head_size,
            "add_qkv_bias": self.add_qkv_bias,
            "qk_layernorm": self.qk_layernorm,
        }

    def with_experts(self, num_moe_experts: int, moe_router_topk: int = 2) -> "Architecture":
        """Return the MoE with these experts in place of every MLP."""
        return replace(self, num_moe_experts=num_moe_experts, moe_router_topk=moe_router_topk)


def layer_pattern(frequency: object, num_layers: int) -> tuple[int, ...]:
    """Return 1 for every MoE layer and 0 for every dense one, from Megatron's `moe_layer_freq`.

    Raises:
        ConfigurationError: The value is neither a positive integer nor a list of `num_layers` zeros and ones with an
            MoE layer.
    """
    if isinstance(frequency, int) and not isinstance(frequency, bool) and frequency > 0:
        return tuple(int(layer % frequency == 0) for layer in range(num_layers))
    pattern = tuple(frequency) if isinstance(frequency, list | tuple) else ()
    if len(pattern) != num_layers or any(type(one) is not int or one not in (0, 1) for one in pattern):
        raise ConfigurationError(
            f"moe_layer_freq is {frequency!r}, expected n for an MoE in every n-th layer, or a list of num_layers"
            f" ({num_layers}) entries with 1 for every MoE layer and 0 for every dense one"
        )
    if not any(pattern):
        raise ConfigurationError(f"moe_layer_freq is {frequency!r}, expected an MoE layer among them")
    return pattern


SKYWORK_13B = Architecture(52, 4608, 12288, 36, vocab_size=65519)
"""Skywork-13B (arXiv 2310.19341, Table 3). The base model's vocabulary has 65,519 entries."""
SKYWORK_MOE_146B = Architecture(52, 4608, 12288, 36, vocab_size=65536, num_moe_experts=16)
"""Skywork-MoE (Table 2)."""
MODELS = {"skywork-13b": SKYWORK_13B, "skywork-moe-146b": SKYWORK_MOE_146B}


def as_architecture(model: str | Architecture | Mapping[str, Any]) -> Architecture:
    """The architecture by a name of `MODELS`, by its fields, or by a text of these: `num_layers=4,hidden_size=64,...`.

    Raises:
        ConfigurationError: It is none of these, or a field is unknown, missing or out of range.
    """
    if isinstance(model, Architecture):
        return model
    if isinstance(model, str) and "=" not in model:
        if model.lower() not in MODELS:
            raise ConfigurationError(
                f"model is {model!r}, expected one of {', '.join(MODELS)}, a folder, or its dimensions"
            )
        return MODELS[model.lower()]
    sizes = _sizes(model) if isinstance(model, str) else model
    known = {field.name for field in fields(Architecture)}
    if unknown := set(sizes) - known:
        raise ConfigurationError(f"model has {sorted(unknown)}, expected some of {sorted(known)}")
    try:
        return Architecture(**sizes)
    except TypeError as reason:
        raise ConfigurationError(f"model: {str(reason).removeprefix('Architecture.__init__() ')}") from reason


def _sizes(text: str) -> dict[str, int | tuple[int, ...]]:
    pairs = [part.partition("=") for part in re.split(r",(?![^\[]*\])", text)]
    return {name.strip(): _size(name.strip(), value.strip()) for name, _, value in pairs}


def _size(name: str, value: str) -> int | tuple[int, ...]:
    if value.startswith("[") and value.endswith("]"):
        return tuple(integer(name, one) for one in value[1:-1].split(","))
    return integer(name, value)


def integer(name: str, value: str) -> int:
    """Return the integer that a text spells.

    Raises:
        ConfigurationError: It spells none. The message has the option's name.
    """
    try:
        return int(value)
    except ValueError:
        raise ConfigurationError(f"{name} is {value!r}, expected an integer") from None
