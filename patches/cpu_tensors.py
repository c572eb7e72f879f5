"""Tensor creation and movement that asks for "cuda" gets the CPU.

Factories are wrapped one by one. A `torch.overrides.TorchFunctionMode` would be shorter, but it adds 1 to 2
microseconds to every torch call (`.shape` included) and ends with its thread. A wrapped factory costs nothing
elsewhere, and holds in every thread and fork.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.jit import _builtins
from torch.utils import _device

from .targets import replace

CPU = torch.device("cpu")
_NEW = ("new_empty", "new_empty_strided", "new_full", "new_ones", "new_tensor", "new_zeros")
_LIKE = ("empty_like", "full_like", "ones_like", "rand_like", "randint_like", "randn_like", "zeros_like")


def names_cuda(device: Any) -> bool:
    """Say whether `device` (a name, an index, a `torch.device` or None) means a CUDA device."""
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, int) or (isinstance(device, str) and device.startswith("cuda"))


def _without_cuda(kwargs: dict[str, Any]) -> dict[str, Any]:
    if names_cuda(kwargs.get("device")):
        kwargs["device"] = CPU
    kwargs.pop("pin_memory", None)
    return kwargs


def _on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def on_cpu(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **_without_cuda(kwargs)) if kwargs else function(*args)

    operator = _builtins._find_builtin(function)
    if operator:  # so that TorchScript still knows it
        _builtins._register_builtin(on_cpu, operator)
    return on_cpu


def factories() -> None:
    """`torch.zeros(..., device="cuda")`: schedules.py, optimizer.py, clip_grads.py and others name the device."""
    # `with torch.device("meta")` looks constructors up in this cached set; fill it while they are torch's own.
    constructors = _device._device_constructors()
    for constructor in constructors:
        name = constructor.__name__
        if getattr(torch, name, None) is constructor:
            setattr(torch, name, _on_cpu(constructor))
    for name in _LIKE:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    for name in _NEW:
        setattr(torch.Tensor, name, _on_cpu(getattr(torch.Tensor, name)))


def tensor_to() -> None:
    """`tensor.to("cuda")`: NeMo's megatron_strategy.py and data_sampler.py log through it."""
    to = torch.Tensor.to

    @functools.wraps(to)
    def to_cpu(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and names_cuda(args[0]):
            args = (CPU, *args[1:])
        return to(self, *args, **(_without_cuda(kwargs) if kwargs else kwargs))

    replace(torch.Tensor, "to", to_cpu)


def tensor_cuda() -> None:
    """`tensor.cuda()`: tensor_parallel/data.py and NeMo's gpt_data_step move batches with it."""

    def cuda(self: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return self.to(CPU)

    replace(torch.Tensor, "cuda", cuda)


def tensor_pin_memory() -> None:
    """`tensor.pin_memory()` raises without an accelerator: dist_checkpointing and data loaders call it."""

    def pin_memory(self: torch.Tensor, *_: Any) -> torch.Tensor:
        return self

    replace(torch.Tensor, "pin_memory", pin_memory)


def tensor_type() -> None:
    """`tensor.type() == "torch.cuda.FloatTensor"`: clip_grads.py, optimizer.py and distrib_optimizer.py compare it."""
    type_of = torch.Tensor.type

    @functools.wraps(type_of)
    def cuda_type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return type_of(self, *args, **kwargs)
        # A torch function mode calls this twice: it looks methods up by name.
        return f"torch.cuda.{type_of(self).rpartition('.')[2]}"

    replace(torch.Tensor, "type", cuda_type)


def tensor_types() -> None:
    """`torch.cuda.LongTensor([1])`: NeMo's fine-tuning data count their ranks with it (llm/gpt/data/utils.py)."""
    for name in ("BFloat16", "Bool", "Byte", "Char", "Double", "Float", "Half", "Int", "Long", "Short"):
        replace(torch.cuda, f"{name}Tensor", getattr(torch, f"{name}Tensor"))


SUBSTITUTIONS = (factories, tensor_to, tensor_cuda, tensor_pin_memory, tensor_type, tensor_types)
