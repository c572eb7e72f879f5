"""NeMo 2 checkpoints: checking one against the model that is to load it."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_skymoe.checkpoint.tensors import TensorInfo
from nemo_skymoe.checkpoint.torch_dist_storage import TorchDistStorage
from nemo_skymoe.config import ConfigurationError

_LAYERS = re.compile(
    r"(?:module\.)?decoder\.layers\.(?:(\d+)\.)?(self_attention\.linear_qkv|mlp\.router)\.weight"
)
_QKV, _ROUTER = "self_attention.linear_qkv", "mlp.router"


def check_architecture(checkpoint: Path, config: Any) -> None:
    """Refuse to start `config`'s model from a checkpoint of another architecture, before anything is built."""
    tensors = TorchDistStorage(checkpoint).tensors
    experts = _shapes(tensors, _ROUTER)
    if config.num_moe_experts and not experts:
        raise ConfigurationError(
            f"the checkpoint '{checkpoint}' is dense, expected {config.num_moe_experts} experts: upcycle it first"
            " with `skymoe upcycle`"
        )
    if experts and not config.num_moe_experts:
        raise ConfigurationError(f"the checkpoint '{checkpoint}' is an MoE, expected a dense model")
    check_sizes(tensors, config, checkpoint)


def check_sizes(tensors: Mapping[str, TensorInfo], config: Any, checkpoint: Path) -> None:
    """Refuse sizes of tensors that differ from the configuration's, naming the option."""
    layers, routers = _shapes(tensors, _QKV), _shapes(tensors, _ROUTER)
    if not layers:
        return
    found = {"num_layers": len(layers), "hidden_size": layers[0][-1]}
    if routers:
        found["num_moe_experts"] = next(iter(routers.values()))[0]
    for option, value in found.items():
        if value != getattr(config, option):
            raise ConfigurationError(
                f"{option} is {getattr(config, option)}, the checkpoint '{checkpoint}' has {value}"
            )
    wanted = _moe_layers(config)
    if sorted(routers) != wanted:
        raise ConfigurationError(
            f"moe_layer_freq is {config.moe_layer_freq}, which makes an MoE of the layers {wanted}, counted from 0; the"
            f" checkpoint '{checkpoint}' has routers in {sorted(routers)}"
        )


def _shapes(tensors: Mapping[str, TensorInfo], module: str) -> dict[int, tuple[int, ...]]:
    """Shape of a module's weight by layer: Megatron stacks equal layers, and numbers those that differ."""
    found: dict[int, tuple[int, ...]] = {}
    for name, info in tensors.items():
        match = _LAYERS.fullmatch(name)
        if match and match[2] == module:
            if match[1] is not None:
                found[int(match[1])] = info.shape
            else:
                found |= dict.fromkeys(range(info.shape[0]), info.shape[1:])
    return found


def _moe_layers(config: Any) -> list[int]:
    """The layers, counted from 0, in which Megatron puts an MoE (get_gpt_decoder_block_spec)."""
    if not config.num_moe_experts:
        return []
    frequency = config.moe_layer_freq
    if isinstance(frequency, int):
        return list(range(0, config.num_layers, frequency))
    return [layer for layer, is_moe in enumerate(frequency) if is_moe]
