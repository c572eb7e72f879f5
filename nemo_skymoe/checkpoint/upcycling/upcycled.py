"""Upcycling: a dense model seen as the MoE it becomes, whose experts and routers are computed while they are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from nemo_skymoe.checkpoint.tensors.model import Key, TensorInfo, Weights, key_shape, model_keys
from nemo_skymoe.checkpoint.upcycling.initialization import (
    Copy,
    Drop,
    Granular,
    Initialization,
    Noise,
    Specialized,
)
from nemo_skymoe.checkpoint.upcycling.options import BASE, Upcycling
from nemo_skymoe.checkpoint.upcycling.random_numbers import Stream, normal
from nemo_skymoe.durable.errors import CheckpointError, ConfigurationError

if TYPE_CHECKING:
    from torch import Tensor


class Upcycled:
    """The MoE's tensors by meaning. Everything but experts and routers is the dense model's, bit for bit.

    Routers are N(0, router_std), the same for every initialisation; a granular model repeats each row G times.

    Args:
        sources: Dense models by name; all but the one called "base" serve the specialised initialisation alone.
        options: The upcycling's.

    Raises:
        ConfigurationError: A source is an MoE already or lacks, or the options do not fit its sizes.
    """

    def __init__(self, sources: Mapping[str, Weights], options: Upcycling):
        check_sources(sources, options)
        self.dense, self.options = sources[BASE], options
        self.architecture = options.architecture(self.dense.architecture)
        self._experts = initialization(sources, options)

    def keys(self) -> tuple[Key, ...]:
        """Return every tensor of the MoE, in the order of the layers."""
        return model_keys(self.architecture)

    def info(self, key: Key) -> TensorInfo:
        """Shape and data type: a router has its layer's gate projection's, an expert its source's."""
        if key.expert is None and key.kind != "router":
            return self.dense.info(key)
        dense = Key("gate" if key.kind == "router" else key.kind, key.layer)
        return TensorInfo(key_shape(self.architecture, key), self.dense.info(dense).dtype)

    def read(self, key: Key) -> Tensor:
        """Return the tensor, computed or read."""
        if key.kind == "router":
            return self._router(key)
        return self.dense.read(key) if key.expert is None else self._experts.read(key)

    def _router(self, key: Key) -> Tensor:
        assert key.layer is not None
        repeats = self.options.granularity or 1
        rows, hidden = key_shape(self.architecture, key)
        stream = Stream(self.options.seed, "router", key.layer)
        dtype = self.info(key).dtype
        drawn = normal(stream, (rows // repeats, hidden), 0.0, self.options.router_std, dtype)
        return drawn.repeat_interleave(repeats, dim=0) if repeats > 1 else drawn


def initialization(sources: Mapping[str, Weights], options: Upcycling) -> Initialization:
    """Return the initialisation of `options`, which computes the experts."""
    dense = sources[BASE]
    if options.init == "noise":
        assert options.noise is not None
        return Noise(dense, options.noise, options.seed)
    if options.init == "drop":
        assert options.drop_ratio is not None
        return Drop(dense, options.drop_ratio, options.seed)
    if options.init == "granular":
        assert options.granularity is not None
        return Granular(dense, options.granularity)
    if options.init == "specialized":
        return Specialized(tuple(sources[name] for name in options.experts()))
    return Copy(dense)


def check_sources(sources: Mapping[str, Weights], options: Upcycling) -> None:
    """Refuse sources that are missing, unused, no dense models, or of another architecture or data type."""
    wanted = {BASE, *options.experts()}
    for name in sorted(wanted - sources.keys()):
        raise ConfigurationError(f"there is no source '{name}': give it as {name}=PATH")
    for name in sorted(sources.keys() - wanted):
        raise ConfigurationError(f"the source '{name}' is used by no expert: name it in expert_source")
    base = sources[BASE]
    for name, source in sources.items():
        if source.architecture.num_moe_experts is not None:
            raise ConfigurationError(f"the source '{name}' is an MoE already, expected a dense model")
        if source.architecture != base.architecture:
            raise ConfigurationError(
                f"the source '{name}' is {source.architecture}, expected the sizes of '{BASE}',"
                f" {base.architecture}"
            )
        different = [key for key in model_keys(base.architecture) if source.info(key) != base.info(key)]
        if different:
            raise ConfigurationError(
                f"the source '{name}' has {different[0]} as {source.info(different[0]).dtype},"
                f" '{BASE}' as {base.info(different[0]).dtype}"
            )


def check_same_base(sources: Mapping[str, Weights]) -> None:
    """Refuse sources that differ from the base in more than their MLPs. Reads all other tensors, one at a time."""
    import torch

    base = sources[BASE]
    for name, source in sources.items():
        if name == BASE:
            continue
        for key in model_keys(base.architecture):
            if key.kind in ("gate", "up", "down"):
                continue
            ours, theirs = base.read(key), source.read(key)
            if not torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8)):
                raise CheckpointError(
                    f"the source '{name}' differs from '{BASE}' in {key}: specialised experts come from models"
                    " that differ in their MLPs alone (appendix C.2)"
                )
