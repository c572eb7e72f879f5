"""Every tensor of the target is computed a second time, from the sources and the options that the receipt names."""

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

_STREAMS = {"router": 0, "gate": 1, "up": 2, "down": 3, "dropped": 4}


class Model(Protocol):
    """Tensors by meaning."""

    def tensor(self, kind: str, layer: int | None = None, expert: int | None = None) -> Tensor:
        """Return one matrix or vector."""
        ...


class Recomputed:
    """The model that a dense one becomes by the options of upcycling.

    Args:
        sources: By name; "base" is the dense model.
        options: Fields of `Upcycling`, as the receipt keeps them.
    """

    def __init__(self, sources: Mapping[str, Model], options: Mapping[str, Any]):
        self.sources, self.options = sources, options
        self._statistics: dict[tuple[str, int], tuple[np.float32, np.float32]] = {}

    def tensor(self, kind: str, layer: int | None = None, expert: int | None = None) -> Tensor:
        """Return one matrix or vector of the MoE."""
        base = self.sources["base"]
        if kind == "router":
            assert layer is not None
            return self._router(layer)
        if expert is None or layer is None:
            return base.tensor(kind, layer)
        init = self.options["init"]
        if init == "specialized":
            names = [name for name, count in self.options["expert_source"] for _ in range(count)]
            return self.sources[names[expert]].tensor(kind, layer)
        if init == "granular":
            return self._part(base.tensor(kind, layer), kind, expert)
        matrix = base.tensor(kind, layer)
        if init == "noise" and self.options["noise"] != 0:
            _, std = self._mean_and_std(kind, layer, matrix)
            drawn = self._normal(kind, layer, expert, matrix.numel()) * np.float32(
                self.options["noise"] * float(std)
            )
            return (matrix.float() + torch.from_numpy(drawn).view_as(matrix)).to(matrix.dtype)
        if init == "drop":
            return self._redrawn(matrix, kind, layer, expert)
        return matrix

    def _router(self, layer: int) -> Tensor:
        gate = self.sources["base"].tensor("gate", layer)
        experts, hidden = self.options["num_experts"], gate.shape[1]
        drawn = self._normal("router", layer, 0, experts * hidden) * np.float32(self.options["router_std"])
        rows = torch.from_numpy(drawn).view(experts, 1, hidden)
        parts = self.options["granularity"] or 1
        return rows.expand(experts, parts, hidden).reshape(-1, hidden).to(gate.dtype)

    def _part(self, matrix: Tensor, kind: str, expert: int) -> Tensor:
        parts = self.options["granularity"]
        if kind == "down":
            return matrix.unflatten(1, (parts, -1))[:, expert % parts] * parts
        return matrix.unflatten(0, (parts, -1))[expert % parts]

    def _redrawn(self, matrix: Tensor, kind: str, layer: int, expert: int) -> Tensor:
        ffn = matrix.shape[1 if kind == "down" else 0]
        count = int(self.options["drop_ratio"] * ffn)
        if not count:
            return matrix
        order = self._generator("dropped", layer, expert, 0).permutation(ffn)
        dropped = np.sort(order[:count])
        mean, std = self._mean_and_std(kind, layer, matrix)
        hidden = matrix.shape[0 if kind == "down" else 1]
        drawn = torch.from_numpy(self._normal(kind, layer, expert, count * hidden) * std + mean).to(
            matrix.dtype
        )
        result = matrix.clone()
        if kind == "down":
            result[:, dropped] = drawn.view(hidden, count)
        else:
            result[dropped] = drawn.view(count, hidden)
        return result

    def _mean_and_std(self, kind: str, layer: int, matrix: Tensor) -> tuple[np.float32, np.float32]:
        if (kind, layer) not in self._statistics:
            mean = sum(row.sum(dtype=torch.float64).item() for row in matrix) / matrix.numel()
            squares = sum((row.double() - mean).square().sum().item() for row in matrix)
            std = (squares / matrix.numel()) ** 0.5
            self._statistics[kind, layer] = np.float32(mean), np.float32(std)
        return self._statistics[kind, layer]

    def _normal(self, kind: str, layer: int, expert: int, count: int) -> np.ndarray:
        """Standard normal numbers: a new Philox counter every 2^20 elements."""
        blocks = range(0, count, 2**20)
        return np.concatenate(
            [
                self._generator(kind, layer, expert, number).standard_normal(
                    min(2**20, count - start), dtype=np.float32
                )
                for number, start in enumerate(blocks)
            ]
        )

    def _generator(self, kind: str, layer: int, expert: int, block: int) -> np.random.Generator:
        key = [self.options["seed"], _STREAMS[kind] * 2**48 + layer * 2**24 + expert]
        counter = [0, 0, 0, block]
        philox = np.random.Philox(
            key=np.array(key, dtype=np.uint64), counter=np.array(counter, dtype=np.uint64)
        )
        return np.random.Generator(philox)
