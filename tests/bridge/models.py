"""Models that Bridge's own code makes in a rank: from one of its checkpoints, or of a Hugging Face folder by `AutoBridge`."""

import os
from pathlib import Path
from typing import Any

import torch
from megatron.bridge import AutoBridge
from megatron.bridge.models.conversion.utils import unwrap_model
from megatron.bridge.training.model_load_save import load_megatron_model
from torch import Tensor

import nemo_skymoe.bridge  # noqa: F401 (registers the conversion of SkyworkForCausalLM)
from nemo_skymoe.checkpoint import convert
from nemo_skymoe.checkpoint.convert import TargetOptions
from nemo_skymoe.checkpoint.sources import open_source
from nemo_skymoe.checkpoint.upcycling.options import Upcycling
from nemo_skymoe.patches import bridge_cpu

ITERATION = "iter_0000000"


def converted(
    source: Path, folder: Path, to: str, upcycling: Upcycling | None = None, **options: Any
) -> Path:
    """What `skymoe convert` or `upcycle` writes, for layers without Transformer Engine."""
    if to != "hf":
        options["layer_spec"] = "local"
    convert.plan({"base": open_source(source)}, TargetOptions(to, **options), upcycling).run(folder)
    return folder


def layout(tp: int, moe: bool) -> dict[str, Any]:
    """The parallel sizes of a world of `tp` ranks: EDP for an MoE."""
    sizes: dict[str, Any] = {"tensor_model_parallel_size": tp, "sequence_parallel": tp > 1}
    if moe and tp > 1:
        sizes |= {"expert_model_parallel_size": tp, "expert_tensor_parallel_size": 1, "moe_edp": True}
    return sizes


def start_world(locks: Path | None = None) -> None:
    """Join the world of this rank. Bridge locks the configuration of a folder while it reads it: in `locks`."""
    bridge_cpu.apply()
    if locks is not None:
        os.environ["MEGATRON_CONFIG_LOCK_DIR"] = str(locks)
    torch.distributed.init_process_group("gloo")


def loaded(folder: Path, tp: int = 1, moe: bool = True) -> Any:
    """The model in a checkpoint, by Bridge's own loader."""
    sizes: Any = layout(tp, moe)
    (model,) = load_megatron_model(str(folder / ITERATION), use_cpu_init=True, mp_overrides=sizes)
    return unwrap_model(model)


def imported(folder: Path, tp: int = 1, moe: bool = True) -> tuple[Any, Any]:
    """The `AutoBridge` of a Hugging Face folder, and the model that it fills."""
    bridge: Any = AutoBridge.from_hf_pretrained(folder)
    provider = bridge.to_megatron_provider()
    for name, value in layout(tp, moe).items():
        setattr(provider, name, value)
    provider.finalize()
    (model,) = provider.provide_distributed_model(wrap_with_ddp=False, use_cpu_initialization=True)
    return bridge, unwrap_model(model)


def tensors(model: Any) -> dict[str, Tensor]:
    """The parameters of a model on this rank."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """The names of tensors that only one side has, or that differ in a bit or in their data type."""
    problems = [name for name in found.keys() ^ expected.keys()]
    return problems + [
        name
        for name in found.keys() & expected.keys()
        if found[name].dtype != expected[name].dtype or not torch.equal(found[name], expected[name])
    ]
