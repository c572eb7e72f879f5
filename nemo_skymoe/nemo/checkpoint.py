"""NeMo 2 checkpoints: upcycling one, and checking one against the model that is to load it."""

import shutil
from pathlib import Path
from typing import Any

from nemo import lightning as nl
from nemo.lightning.io.pl import TrainerContext

from nemo_skymoe.checkpoint import torch_dist
from nemo_skymoe.checkpoint.upcycle import ROUTER, check_dense, moe_extra_states, upcycle
from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.nemo.model import SkyworkMoEModel


def upcycle_checkpoint(dense: Path, output: Path, model: SkyworkMoEModel, seed: int = 0) -> Path:
    """Upcycle NeMo's dense checkpoint `dense` into a NeMo checkpoint of `model`, weights only.

    Args:
        dense: Checkpoint folder with `weights/`.
        output: Must not exist; appears only when it is complete.
        model: Gives the number of experts and the context (configuration and tokenizer) of the result.
        seed: Of the routers.

    Raises:
        ConfigurationError: `dense` is not a dense Skywork of the model's sizes, or `output` exists.
    """
    if output.exists():
        raise ConfigurationError(f"the output '{output}' exists already")
    shapes = torch_dist.read_shapes(dense)
    check_dense(shapes)
    check_sizes(shapes, model.config, dense)
    unfinished = output.with_name(output.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    experts: Any = model.config
    tensors = upcycle(torch_dist.read_weights(dense), experts.num_moe_experts, experts.init_method_std, seed)
    extra_states = moe_extra_states(experts.num_layers, experts.num_moe_experts)
    torch_dist.write_weights(unfinished, {**tensors, **extra_states})
    trainer = nl.Trainer(accelerator="cpu", devices=1, strategy=nl.MegatronStrategy())
    TrainerContext(model=model, trainer=trainer, extra={}).io_dump(
        unfinished / "context", yaml_attrs=["model"]
    )
    unfinished.rename(output)
    return output


def check_architecture(checkpoint: Path, config: Any) -> None:
    """Refuse to start `config`'s model from a checkpoint of another architecture, before anything is built."""
    shapes = torch_dist.read_shapes(checkpoint)
    is_moe, wants_moe = ROUTER in shapes, bool(config.num_moe_experts)
    if wants_moe and not is_moe:
        raise ConfigurationError(
            f"the checkpoint '{checkpoint}' is dense, expected {config.num_moe_experts} experts: upcycle it first"
            " with `skymoe upcycle`"
        )
    if is_moe and not wants_moe:
        raise ConfigurationError(f"the checkpoint '{checkpoint}' is an MoE, expected a dense model")
    check_sizes(shapes, config, checkpoint)


def check_sizes(shapes: dict[str, Any], config: Any, checkpoint: Path) -> None:
    """Refuse sizes of tensors that differ from the configuration's, naming the option."""
    qkv = shapes.get("module.decoder.layers.self_attention.linear_qkv.weight")
    if qkv is None:
        return
    found = {"num_layers": qkv[0], "hidden_size": qkv[2]}
    if ROUTER in shapes:
        found["num_moe_experts"] = shapes[ROUTER][1]
    for option, value in found.items():
        if value != getattr(config, option):
            raise ConfigurationError(
                f"{option} is {getattr(config, option)}, the checkpoint '{checkpoint}' has {value}"
            )
