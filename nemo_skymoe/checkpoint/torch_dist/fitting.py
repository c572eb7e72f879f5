"""Check a checkpoint of Megatron against the model that will load it, and let Megatron find its layers as they are stored."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nemo_skymoe.architecture import layer_pattern
from nemo_skymoe.checkpoint.tensors.model import TensorInfo
from nemo_skymoe.checkpoint.torch_dist.deciding import CHANGES, check_deciding, options_of
from nemo_skymoe.checkpoint.torch_dist.layer_tensors import (
    LAYER,
    LEAST_OTHER_VOCABULARY,
    expected_globals,
    expected_layer,
)
from nemo_skymoe.checkpoint.torch_dist.options import saved_options
from nemo_skymoe.checkpoint.torch_dist.storage import TorchDistStorage
from nemo_skymoe.config import ConfigurationError

_QKV, _ROUTER = "self_attention.linear_qkv.weight", "mlp.router.weight"
Layers = dict[int, dict[str, tuple[int, ...]]]

logger = logging.getLogger(__name__)


def check_architecture(
    checkpoint: Path, config: Any, spelled: Callable[[str], str] = str, vocabulary: int | None = None
) -> None:
    """Refuse to start `config`'s model from a checkpoint of another model, before anything is built.

    What a checkpoint says of its model is compared in full, and then its tensors. Options that `config` names in
    `differs_from_checkpoint` may be others.

    Megatron can store equal layers stacked in one tensor, or each by its number. If the checkpoint does it the other
    way, the configuration is changed to the checkpoint's way: `moe_layer_freq` [1, 1] and 1 are the same model.

    Args:
        checkpoint: The folder.
        config: The configuration of the model.
        spelled: Returns what a user writes for an option of the model, such as "model.config.rotary_base".
        vocabulary: Tokens of the vocabulary, if `config.vocab_size` is still open.

    Raises:
        ConfigurationError: They differ. The message has every difference with the option that decides.
    """
    tensors = TorchDistStorage(checkpoint).tensors
    layers = _layers(tensors)
    if not any(_QKV in layer for layer in layers.values()):
        return  # adapters, or an attention that is not known here
    experts = [number for number, layer in layers.items() if _ROUTER in layer]
    if config.num_moe_experts and not experts:
        raise ConfigurationError(
            f"the checkpoint '{checkpoint}' is dense, expected {config.num_moe_experts} experts: upcycle it first"
            " with `skymoe upcycle`"
        )
    if experts and not config.num_moe_experts:
        raise ConfigurationError(f"the checkpoint '{checkpoint}' is an MoE, expected a dense model")
    if (saved := saved_options(checkpoint)) is not None:
        check_deciding(saved, options_of(config), getattr(config, CHANGES, None), checkpoint, spelled)
    check_sizes(tensors, config, checkpoint, vocabulary)
    _store_alike(tensors, config)


def check_sizes(
    tensors: Mapping[str, TensorInfo], config: Any, checkpoint: Path, vocabulary: int | None = None
) -> None:
    """Refuse a checkpoint whose tensors are missing, superfluous or of other sizes than the configuration says.

    The message names every option that decides. `vocabulary` takes the place of a `config.vocab_size` that is open.
    """
    layers = {number: layer for number, layer in _layers(tensors).items() if _QKV in layer}
    if not layers:
        return
    found = {"num_layers": len(layers), "hidden_size": next(iter(layers.values()))[_QKV][-1]}
    routers = [layer[_ROUTER] for layer in layers.values() if _ROUTER in layer]
    if routers:
        found["num_moe_experts"] = routers[0][0]
    said = {
        option: f"{option} is {getattr(config, option)}, it has {value}"
        for option, value in found.items()
        if value != getattr(config, option)
    }
    if "num_layers" not in said:
        said |= _pattern(layers, config)
    if not said:  # the shapes of layers follow from these
        for number in sorted(layers):
            expected = expected_layer(config, is_moe=_ROUTER in layers[number])
            said = _layer(layers[number], expected, f"layer {number}") | said
    said |= _globals(tensors, config, getattr(config, "vocab_size", None) or vocabulary)
    if said:
        raise ConfigurationError(
            f"the checkpoint '{checkpoint}' does not fit the model: {'; '.join(said.values())}"
        )


def _pattern(layers: Layers, config: Any) -> dict[str, str]:
    wanted, found = _moe_layers(config), sorted(n for n, layer in layers.items() if _ROUTER in layer)
    if found == wanted:
        return {}
    first = min({*wanted} ^ {*found})
    kinds = ("an MoE", "dense") if first in wanted else ("dense", "an MoE")
    return {
        "moe_layer_freq": f"moe_layer_freq is {config.moe_layer_freq}, which makes layer {first}, counted from 0,"
        f" {kinds[0]}; in the checkpoint it is {kinds[1]}: there are routers in {found}, expected in {wanted}"
    }


def _layer(
    found: dict[str, tuple[int, ...]],
    expected: dict[str, tuple[str, Any, tuple[int, ...] | None]],
    place: str,
) -> dict[str, str]:
    """Return what differs between the tensors of a layer and `expected`, once for each option that decides.

    `expected` has for each tensor the option that decides, its value, and the shape, or None if there is no such
    tensor.
    """
    differing: dict[str, str] = {}
    for tensor, (option, value, shape) in expected.items():
        has = found.get(tensor)
        if has == shape or (has is None and _companion(tensor) not in found):
            continue
        said = f"{option} is {value}"
        if shape is None:
            said += f", but {place} has '{tensor}'"
        elif has is None:
            said += f", but {place} has no '{tensor}'"
        else:
            said += f", which makes '{tensor}' {list(shape)}; in {place} it is {list(has)}"
        differing.setdefault(option, said)
    return differing


def _companion(tensor: str) -> str:
    """Return a tensor that always accompanies this one. A checkpoint that has it alone is of another model."""
    module, _, kind = tensor.rpartition(".")
    if kind == "bias":
        return f"{module}.weight"
    if module.endswith("_layernorm"):
        return _QKV
    if module.startswith(("mlp.shared_experts", "mlp.router")):
        return _ROUTER
    first, second = "linear_fc1", "linear_fc2"
    return tensor.replace(first, second) if first in tensor else tensor.replace(second, first)


def _globals(tensors: Mapping[str, TensorInfo], config: Any, vocabulary: int | None) -> dict[str, str]:
    plain = {name.removeprefix("module."): info.shape for name, info in tensors.items()}
    rows = plain.get("embedding.word_embeddings.weight")
    if rows is None:
        return {}
    said = {
        option: f"{option} is {value}, but it has {'no' if wanted else 'an'} '{tensor}'"
        for tensor, (option, value, wanted) in expected_globals(config).items()
        if (tensor in plain) != wanted
    }
    if vocabulary and not vocabulary <= rows[0] < vocabulary + LEAST_OTHER_VOCABULARY:
        said["vocab_size"] = (
            f"vocab_size is {vocabulary}, but its embedding has {rows[0]} rows: Megatron would cut it, or leave rows"
            " untrained, without a word"
        )
    return said


def _store_alike(tensors: Mapping[str, TensorInfo], config: Any) -> None:
    """Let Megatron look for layers as they are stored: each by its number, or equal ones stacked."""
    numbered = any(match[1] is not None for name in tensors if (match := LAYER.fullmatch(name)))
    frequency = getattr(config, "moe_layer_freq", 1)
    by_number = getattr(config, "hetereogenous_dist_checkpoint", False)
    if numbered == bool(by_number or isinstance(frequency, list) or frequency > 1):
        return
    logger.info(
        f"the checkpoint has its layers {'by their numbers' if numbered else 'stacked'}: this run stores them alike"
    )
    if numbered and hasattr(config, "hetereogenous_dist_checkpoint"):
        config.hetereogenous_dist_checkpoint = True
    elif numbered:
        config.moe_layer_freq = [1] * config.num_layers
    else:  # only layers that are equal can be stacked
        config.moe_layer_freq, config.hetereogenous_dist_checkpoint = 1, False


def _layers(tensors: Mapping[str, TensorInfo]) -> Layers:
    """Return shapes by layer and tensor. Megatron stacks equal layers, and numbers those that differ."""
    found: Layers = {}
    for name, info in tensors.items():
        match = LAYER.fullmatch(name)
        if match is None:
            continue
        if match[1] is not None:
            found.setdefault(int(match[1]), {})[match[2]] = info.shape
            continue
        for number in range(info.shape[0]):
            found.setdefault(number, {})[match[2]] = info.shape[1:]
    return found


def _moe_layers(config: Any) -> list[int]:
    """Return the layers, counted from 0, in which Megatron puts an MoE (get_gpt_decoder_block_spec)."""
    if not config.num_moe_experts:
        return []
    pattern = layer_pattern(config.moe_layer_freq, config.num_layers)
    return [layer for layer, is_moe in enumerate(pattern) if is_moe]
