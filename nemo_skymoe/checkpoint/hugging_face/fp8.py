"""Checkpoints in 8 bits with one scale a tensor (AutoFP8, the FP8 release of Skywork-MoE), read as bfloat16."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nemo_skymoe.checkpoint.tensors.mapping import listed
from nemo_skymoe.checkpoint.tensors.model import TensorInfo
from nemo_skymoe.checkpoint.tensors.regions import FileStorage
from nemo_skymoe.checkpoint.tensors.storage_view import StorageView
from nemo_skymoe.durable.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

SCALE = "_scale"
EIGHT_BITS = ("float8_e4m3fn", "float8_e5m2")


class Dequantized(StorageView):
    """A storage whose 8-bit tensors appear as bfloat16: `weight` times its own `weight_scale`, rounded once.

    Each tensor has its own scale, w1 and w3 of an expert too, which a server that fuses them must assume equal.

    Raises:
        CheckpointError: An 8-bit tensor has no scale, or a scale no 8-bit tensor.
    """

    def __init__(self, storage: FileStorage):
        stored = storage.tensors
        self._quantized = {name for name, info in stored.items() if info.dtype in EIGHT_BITS}
        scales = {name for name in stored if name.endswith(f".weight{SCALE}")}
        _check_scales(storage, self._quantized, scales)
        tensors = {
            name: TensorInfo(info.shape, "bfloat16") if name in self._quantized else info
            for name, info in stored.items()
            if name not in scales
        }
        super().__init__(storage, tensors)

    def read(self, name: str, index: tuple[int, ...] = (), rows: tuple[int, int] | None = None) -> Tensor:
        """Return the same as from the storage itself; an 8-bit tensor is multiplied in float32."""
        tensor = super().read(name, index, rows)
        if name not in self._quantized:
            return tensor
        import torch

        scale = super().read(name + SCALE).float().reshape(())
        if not (torch.isfinite(scale) and scale > 0):
            raise CheckpointError(
                f"'{name}{SCALE}' in '{self.folder}' is {scale.item()}, expected a positive number"
            )
        return tensor.float().mul_(scale).to(torch.bfloat16)


def _check_scales(storage: FileStorage, quantized: set[str], scales: set[str]) -> None:
    wanted = {name + SCALE for name in quantized}
    problems = [f"'{name}' is missing" for name in sorted(wanted - scales)]
    problems += [f"'{name}' scales no 8-bit tensor" for name in sorted(scales - wanted)]
    problems += [
        f"'{name}' is {list(shape)}, expected one number"
        for name in sorted(scales & wanted)
        if (shape := storage.tensors[name].shape) not in ((), (1,))
    ]
    if problems:
        raise CheckpointError(f"'{storage.folder}' has wrong FP8 scales: {listed(problems)}")
