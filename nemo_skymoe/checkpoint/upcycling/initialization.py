"""The initialisations of upcycling: each computes the experts from dense MLPs, one matrix at a time."""

from __future__ import annotations

from math import floor
from typing import TYPE_CHECKING, Protocol

from nemo_skymoe.checkpoint.tensors.buffers import empty
from nemo_skymoe.checkpoint.tensors.model import Key, Weights
from nemo_skymoe.checkpoint.upcycling.random_numbers import Stream, add_normal, normal
from nemo_skymoe.checkpoint.upcycling.statistics import Statistics

if TYPE_CHECKING:
    from torch import Tensor


class Initialization(Protocol):
    """Computes the matrices of experts."""

    def read(self, key: Key) -> Tensor:
        """Return the matrix `gate`, `up` or `down` of an expert, contiguous, the caller's own."""
        ...


class Copy:
    """Every expert is the dense MLP (sec. 3)."""

    def __init__(self, dense: Weights):
        self.dense = dense

    def read(self, key: Key) -> Tensor:
        """Return the dense matrix."""
        return self.dense.read(Key(key.kind, key.layer))


class Noise:
    """The dense MLP and noise: N(0, noise * std) with the standard deviation of that dense matrix."""

    def __init__(self, dense: Weights, noise: float, seed: int):
        self.dense, self.noise, self.seed = dense, noise, seed
        self._statistics = Statistics()

    def read(self, key: Key) -> Tensor:
        """Return the dense matrix with this expert's noise; at noise 0 bit for bit the dense matrix."""
        assert key.layer is not None and key.expert is not None
        dense = Key(key.kind, key.layer)
        matrix = self.dense.read(dense)
        if self.noise:
            _, std = self._statistics.of(dense, matrix)
            add_normal(Stream(self.seed, key.kind, key.layer, key.expert), matrix, self.noise * std)
        return matrix


class Drop:
    """Drop-Upcycling (arXiv 2502.19261): part of the intermediate dimension starts anew, elsewhere in every expert.

    floor(ratio * ffn) intermediate indices, one set per layer and expert: those rows of `gate` and `up` and those
    columns of `down` are drawn from N(mean, std) of the whole dense matrix. (The authors' code takes the
    statistics of the replaced entries alone: at full width the same within a thousandth.)
    """

    def __init__(self, dense: Weights, ratio: float, seed: int):
        self.dense, self.ratio, self.seed = dense, ratio, seed
        self._statistics = Statistics()

    def dropped(self, layer: int, expert: int) -> Tensor:
        """Return the intermediate indices that start anew, ascending: the first of a permutation of their own stream."""
        import torch

        ffn = self.dense.architecture.ffn_hidden_size
        order = Stream(self.seed, "dropped", layer, expert).generator().permutation(ffn)
        return torch.from_numpy(order[: floor(self.ratio * ffn)]).sort().values

    def read(self, key: Key) -> Tensor:
        """Return the dense matrix with this expert's rows or columns redrawn."""
        assert key.layer is not None and key.expert is not None
        dense = Key(key.kind, key.layer)
        matrix = self.dense.read(dense)
        indices = self.dropped(key.layer, key.expert)
        if len(indices):
            dimension = 1 if key.kind == "down" else 0
            shape = list(matrix.shape)
            shape[dimension] = len(indices)
            mean, std = self._statistics.of(dense, matrix)
            stream = Stream(self.seed, key.kind, key.layer, key.expert)
            drawn = normal(stream, tuple(shape), mean, std, self.dense.info(dense).dtype)
            matrix.index_copy_(dimension, indices, drawn)
        return matrix


class Granular:
    """Fine-grained experts: expert e * G + g is part g of G of the intermediate dimension of copy e.

    The down projection is scaled by G: a token that meets all parts of a copy gives each 1/G of its weight.
    G is a power of two, which makes the scaling exact.
    """

    def __init__(self, dense: Weights, granularity: int):
        self.dense, self.granularity = dense, granularity
        self._layer: int | None = None
        self._matrices: dict[str, Tensor] = {}

    def read(self, key: Key) -> Tensor:
        """Rows of the dense `gate` or `up`, scaled columns of `down`."""
        assert key.layer is not None and key.expert is not None
        import torch

        size = self.dense.architecture.ffn_hidden_size // self.granularity
        start = key.expert % self.granularity * size
        matrix = self._dense(key.kind, key.layer)
        part = matrix.narrow(1 if key.kind == "down" else 0, start, size)
        result = empty(part.shape, self.dense.info(Key(key.kind, key.layer)).dtype)
        return torch.mul(part, self.granularity, out=result) if key.kind == "down" else result.copy_(part)

    def _dense(self, kind: str, layer: int) -> Tensor:
        # Kept while a layer is being read, or every part would cost the reading of a whole matrix.
        if layer != self._layer:
            self._layer = layer
            self._matrices.clear()
        if kind not in self._matrices:
            self._matrices[kind] = self.dense.read(Key(kind, layer))
        return self._matrices[kind]


class Specialized:
    """Experts from dense models that differ in nothing but their MLPs (appendix C.2), one model an expert."""

    def __init__(self, sources: tuple[Weights, ...]):
        self.sources = sources

    def read(self, key: Key) -> Tensor:
        """Return the matrix of the expert's own source."""
        assert key.expert is not None
        return self.sources[key.expert].read(Key(key.kind, key.layer))
