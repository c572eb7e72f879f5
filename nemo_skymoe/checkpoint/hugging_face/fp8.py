"""Checkpoints in 8 bits, read as bfloat16: with one scale a tensor (AutoFP8, the FP8 release of Skywork-MoE) or a block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nemo_skymoe.checkpoint.tensors.mapping import listed
from nemo_skymoe.checkpoint.tensors.model import TensorInfo
from nemo_skymoe.checkpoint.tensors.regions import FileStorage
from nemo_skymoe.checkpoint.tensors.storage_view import StorageView
from nemo_skymoe.durable.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

SCALE, BLOCK_SCALES = "_scale", "_scale_inv"
"""What follows a weight's name in those of its one scale, and of its scales by block (DeepSeek-V3, Qwen3)."""
EIGHT_BITS = ("float8_e4m3fn", "float8_e5m2")

Block = tuple[int, int]
"""Rows and columns that share a scale."""


def block_of(config: Mapping[str, Any]) -> Block | None:
    """Return the `weight_block_size` of a config.json; None where every tensor has one scale.

    Raises:
        ValueError: It is not a pair of sizes.
    """
    quantization = config.get("quantization_config")
    sizes = quantization.get("weight_block_size") if isinstance(quantization, Mapping) else None
    if sizes is None:
        return None
    if (
        not isinstance(sizes, list | tuple)
        or len(sizes) != 2
        or not all(type(size) is int and size > 0 for size in sizes)
    ):
        raise ValueError(f"weight_block_size is {sizes!r}, expected two numbers of rows and columns")
    return sizes[0], sizes[1]


class Dequantized(StorageView):
    """A storage whose 8-bit tensors appear as bfloat16: the stored numbers times their scale, rounded once.

    Each tensor has its own scale or scales, w1 and w3 of an expert too, which a server that fuses them must assume equal.

    Args:
        storage: With `weight_scale` of one number, or `weight_scale_inv` [rows / block, columns / block], rounded up,
            beside each 8-bit `weight` [rows, columns].
        block: Rows and columns that share a scale; None for one scale a tensor.

    Raises:
        CheckpointError: An 8-bit tensor has no scale or one of another shape, or a scale no 8-bit tensor.
    """

    def __init__(self, storage: FileStorage, block: Block | None = None):
        stored = storage.tensors
        self._block, self._ending = block, SCALE if block is None else BLOCK_SCALES
        self._quantized = {name for name, info in stored.items() if info.dtype in EIGHT_BITS}
        scales = {name for name in stored if name.endswith((f".weight{SCALE}", f".weight{BLOCK_SCALES}"))}
        self._check_scales(storage, scales)
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

        scale = super().read(name + self._ending).float()
        if not (torch.isfinite(scale).all() and (scale > 0).all()):
            wrong = scale[~(torch.isfinite(scale) & (scale > 0))].reshape(-1)[0].item()
            raise CheckpointError(
                f"'{name}{self._ending}' in '{self.folder}' is {wrong}, expected a positive number"
            )
        scale = scale.reshape(()) if self._block is None else self._of_elements(scale, name, index, rows)
        return tensor.float().mul_(scale).to(torch.bfloat16)

    def _of_elements(
        self, scale: Tensor, name: str, index: tuple[int, ...], rows: tuple[int, int] | None
    ) -> Tensor:
        """Return the scale of every element that a read gives."""
        import torch

        assert self._block is not None
        (height, width), shape = self._block, self.tensors[name].shape
        start, stop = (index[0], index[0] + 1) if index else rows or (0, shape[0])
        wanted = scale[torch.arange(start, stop) // height]
        wanted = wanted.repeat_interleave(width, dim=1)[:, : shape[1]]
        if not index:
            return wanted
        wanted = wanted[(0, *index[1:])]
        return wanted if rows is None else wanted[rows[0] : rows[1]]

    def _check_scales(self, storage: FileStorage, scales: set[str]) -> None:
        by_block = min((name for name in scales if name.endswith(BLOCK_SCALES)), default=None)
        if by_block is not None and self._block is None:
            raise CheckpointError(
                f"'{by_block}' in '{storage.folder}' has the scales of blocks, expected weight_block_size in the"
                " quantization_config of config.json"
            )
        wanted = {name + self._ending for name in self._quantized}
        problems = [f"'{name}' is missing" for name in sorted(wanted - scales)]
        problems += [f"'{name}' scales no 8-bit tensor" for name in sorted(scales - wanted)]
        for name in sorted(scales & wanted):
            shape = storage.tensors[name].shape
            weight = storage.tensors[name.removesuffix(self._ending)].shape
            if self._block is None:
                right, expected = shape in ((), (1,)), "one number"
            else:
                sizes = tuple(-(-size // side) for size, side in zip(weight, self._block, strict=False))
                right, expected = (
                    len(weight) == 2 and shape == sizes,
                    f"{list(sizes)} for blocks of {list(self._block)}",
                )
            if not right:
                problems.append(f"'{name}' is {list(shape)}, expected {expected}")
        if problems:
            raise CheckpointError(f"'{storage.folder}' has wrong FP8 scales: {listed(problems)}")
