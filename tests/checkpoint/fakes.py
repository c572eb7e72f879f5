"""A Storage and a Weights made of a dictionary, for tests that need no files."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from nemo_skymoe.architecture import Architecture
from nemo_skymoe.checkpoint.tensors.model import Key, TensorInfo, key_shape, model_keys


def tensor_info(tensor: Tensor) -> TensorInfo:
    return TensorInfo(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))


class DictStorage:
    """Named tensors in memory; `reads` counts what was asked for."""

    def __init__(self, tensors: Mapping[str, Tensor], folder: Path = Path("in-memory")):
        self.values, self.folder = dict(tensors), folder
        self.files: tuple[Path, ...] = ()
        self.reads: list[str] = []

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return {name: tensor_info(value) for name, value in self.values.items()}

    def read(self, name: str, index: tuple[int, ...] = (), rows: tuple[int, int] | None = None) -> Tensor:
        self.reads.append(name)
        tensor = self.values[name][index]
        return (tensor if rows is None else tensor[rows[0] : rows[1]]).clone()


class DictWeights:
    """A model's tensors in memory, by meaning."""

    def __init__(self, architecture: Architecture, values: Mapping[Key, Tensor]):
        self.architecture, self.values = architecture, dict(values)

    def keys(self) -> tuple[Key, ...]:
        return model_keys(self.architecture)

    def info(self, key: Key) -> TensorInfo:
        return tensor_info(self.values[key])

    def read(self, key: Key) -> Tensor:
        return self.values[key].clone()


def random_weights(
    architecture: Architecture, dtype: torch.dtype = torch.float32, seed: int = 0
) -> DictWeights:
    """Every tensor of a model of this architecture, drawn from a normal distribution."""
    generator = torch.Generator().manual_seed(seed)
    return DictWeights(
        architecture,
        {
            key: torch.randn(key_shape(architecture, key), generator=generator).to(dtype)
            for key in model_keys(architecture)
        },
    )
