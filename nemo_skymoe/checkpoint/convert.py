"""Checkpoints are converted from folder to folder, from any format to either, and upcycled on the way or not.

Nothing here needs torch until a plan runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from nemo_skymoe import __version__
from nemo_skymoe.checkpoint.description import Description
from nemo_skymoe.checkpoint.hugging_face import exported_files
from nemo_skymoe.checkpoint.hugging_face import names as hugging_face_names
from nemo_skymoe.checkpoint.hugging_face.families import LAYOUTS, layout_of
from nemo_skymoe.checkpoint.hugging_face.target import HuggingFaceTarget
from nemo_skymoe.checkpoint.job import conversion as job
from nemo_skymoe.checkpoint.sources import Source
from nemo_skymoe.checkpoint.tensors.mapping import Chunk
from nemo_skymoe.checkpoint.tensors.model import TensorInfo, Weights
from nemo_skymoe.checkpoint.tensors.target import Target, check_complete, stored_dtypes
from nemo_skymoe.checkpoint.torch_dist import names as torch_dist_names
from nemo_skymoe.checkpoint.torch_dist.bridge import BridgeTarget, bridge_files
from nemo_skymoe.checkpoint.torch_dist.context import context_files
from nemo_skymoe.checkpoint.torch_dist.names import LAYER_SPECS
from nemo_skymoe.checkpoint.torch_dist.target import TorchDistTarget
from nemo_skymoe.checkpoint.upcycling.options import BASE, Upcycling
from nemo_skymoe.checkpoint.upcycling.upcycled import Upcycled, check_same_base
from nemo_skymoe.durable.errors import ConfigurationError


@dataclass(frozen=True)
class TargetOptions:
    """The options of the checkpoint that is to be written."""

    to: str
    """"hf" for Hugging Face's form, "nemo" for a checkpoint of NeMo 2, or "bridge" for one of Megatron-Bridge."""
    shard_bytes: int = 5_000_000_000
    """Largest size of a safetensors file, in bytes."""
    vocab_size: int | None = None
    """Rows of embedding and head for NeMo or Bridge, padding included. None means the next multiple of 128."""
    layer_spec: str | None = None
    """"te" or "local": the layers whose names a checkpoint for NeMo or Bridge has, Transformer Engine's or Megatron's own.
    None means "te". The models of this package load either into either."""
    layout: str | None = None
    """The class in whose form an MoE is written: "skywork", "mixtral" or "qwen3_moe". None means the class that it was
    read from, and Skywork's for one that was upcycled or trained here."""

    def __post_init__(self) -> None:
        if self.to not in _TARGETS:
            raise ConfigurationError(f"to is '{self.to}', expected one of {', '.join(_TARGETS)}")
        if self.shard_bytes < 1:
            raise ConfigurationError(f"shard_size is {self.shard_bytes}, expected at least 1 byte")
        if self.layout is not None and self.to != "hf":
            raise ConfigurationError(f"layout belongs to Hugging Face's form, but to is {self.to}")
        if self.layout not in (None, *LAYOUTS):
            raise ConfigurationError(f"layout is '{self.layout}', expected one of {', '.join(LAYOUTS)}")
        for option in ("vocab_size", "layer_spec"):
            if self.to == "hf" and getattr(self, option) is not None:
                raise ConfigurationError(
                    f"{option} belongs to checkpoints of NeMo or Bridge, but to is {self.to}"
                )
        if self.layer_spec not in (None, *LAYER_SPECS):
            raise ConfigurationError(
                f"layer_spec is '{self.layer_spec}', expected {' or '.join(LAYER_SPECS)}"
            )


@dataclass(frozen=True)
class Plan:
    """A conversion that has been checked as far as headers allow."""

    sources: Mapping[str, Source]
    weights: Weights
    target: Target
    job: Mapping[str, Any]
    """The values that identify the job: the same job gives the same bytes."""

    def infos(self) -> dict[str, TensorInfo]:
        """Return every tensor that will be written, by the name under which it is stored."""
        dtypes = self.target.dtypes
        return {chunk.tensor: TensorInfo(chunk.shape, dtypes[chunk.tensor]) for chunk in self.target.chunks}

    def check_output(self, output: Path) -> None:
        """Refuse an output that another job wrote, as `run` would. This reads the receipt alone."""
        job.check_output(output, self.job, self.target)

    def run(
        self,
        output: Path,
        *,
        workers: int = 1,
        progress: Callable[[int, int, str], None] | None = None,
        allow_nonfinite: bool = False,
        repair: bool = False,
        on_damage: job.OnDamage | None = None,
    ) -> dict[str, Any]:
        """Write `output`, continue an interrupted run of the same plan, or repair a finished output.

        Args:
            output: The folder to write. It appears when everything in it is complete.
            workers: Number of processes. It does not change a byte of the result.
            progress: Called with the bytes done, their sum, and a word.
            allow_nonfinite: Whether to keep NaN and Inf, which are refused otherwise.
            repair: Whether to write files of a finished output again that are missing, damaged or edited.
            on_damage: Called with the files that are repaired, and what is wrong with each.

        Returns:
            The receipt.

        Raises:
            ConfigurationError: The output belongs to another job, a source has changed, or the options do not go
                together.
        """
        upcycling = self.job["upcycling"]
        if allow_nonfinite and upcycling is not None and upcycling["init"] in ("noise", "drop"):
            raise ConfigurationError(
                f"allow_nonfinite does not go with init {upcycling['init']}: NaN and Inf have no standard deviation"
            )
        if len(self.sources) > 1:
            check_same_base({name: source.weights for name, source in self.sources.items()})
        # In an order that is not the command's: repeated with its sources turned round it is the same job.
        storages: list[Any] = [self.sources[name].weights.storage for name in sorted(self.sources)]
        return job.run(
            self.weights,
            self.target,
            output,
            job=self.job,
            sources=storages,
            workers=workers,
            progress=progress,
            allow_nonfinite=allow_nonfinite,
            repair=repair,
            on_damage=on_damage,
        )


def plan(sources: Mapping[str, Source], options: TargetOptions, upcycling: Upcycling | None = None) -> Plan:
    """Plan a conversion or an upcycling, from the sources' headers alone.

    Args:
        sources: Sources by name. The one called "base" is converted, and the others give specialised experts.
        options: The options of the target.
        upcycling: The options of upcycling; None converts without change.

    Raises:
        ConfigurationError: The sources do not fit the options, or the target would not be complete.
    """
    if BASE not in sources:
        raise ConfigurationError(f"there is no source '{BASE}': give it as {BASE}=PATH")
    base = sources[BASE]
    weights: Weights = base.weights
    if upcycling is not None:
        weights = Upcycled({name: source.weights for name, source in sources.items()}, upcycling)
    description = replace(base.description, architecture=weights.architecture)
    target, written = _TARGETS[options.to](weights, description, base.tokenizer, options)
    check_complete(target.chunks, weights)
    identity = {
        "command": "convert" if upcycling is None else "upcycle",
        "to": options.to,
        **written,
        "upcycling": None if upcycling is None else asdict(upcycling),
        "versions": {"nemo_skymoe": __version__, "numpy": version("numpy"), "torch": version("torch")},
    }
    return Plan(sources, weights, target, identity)


def hugging_face_target(
    weights: Weights, description: Description, tokenizer_folder: Path | None, options: TargetOptions
) -> tuple[HuggingFaceTarget, dict[str, Any]]:
    """Return a folder of safetensors, and the options that made it."""
    qwen = layout_of(description, options.layout) == "qwen3_moe"
    chunks = hugging_face_names.chunks(weights.architecture, "qwen3_moe" if qwen else "skywork")
    extras = exported_files.extras(description, tokenizer_folder, options.layout)
    dtypes = stored_dtypes(chunks, weights)
    target = HuggingFaceTarget(chunks, dtypes, shard_bytes=options.shard_bytes, extras=extras)
    layout = {} if options.layout is None else {"layout": options.layout}
    return target, {"shard_bytes": options.shard_bytes, **layout}


def nemo_target(
    weights: Weights, description: Description, tokenizer_folder: Path | None, options: TargetOptions
) -> tuple[TorchDistTarget, dict[str, Any]]:
    """Return a NeMo 2 checkpoint, and the options that made it."""
    written = _torch_dist_options(weights, options)
    tensors = _torch_dist_tensors(weights, **written, prefix=torch_dist_names.PREFIX)
    config = exported_files.config_file(description)
    extras = context_files(
        description, tokenizer_folder, config=config, padded_vocab_size=written["vocab_size"]
    )
    return TorchDistTarget(*tensors, extras), written


def bridge_target(
    weights: Weights, description: Description, tokenizer_folder: Path | None, options: TargetOptions
) -> tuple[BridgeTarget, dict[str, Any]]:
    """Return a checkpoint of Megatron-Bridge, and the options that made it."""
    written = _torch_dist_options(weights, options)
    tensors = _torch_dist_tensors(weights, **written, prefix="")
    config = exported_files.config_file(description)
    extras = bridge_files(
        description, tokenizer_folder, config=config, padded_vocab_size=written["vocab_size"]
    )
    return BridgeTarget(*tensors, extras), written


def _torch_dist_options(weights: Weights, options: TargetOptions) -> dict[str, Any]:
    rows = options.vocab_size or torch_dist_names.padded_vocab_size(weights.architecture.vocab_size)
    return {"vocab_size": rows, "layer_spec": options.layer_spec or "te"}


def _torch_dist_tensors(
    weights: Weights, vocab_size: int, layer_spec: str, prefix: str
) -> tuple[list[Chunk], dict[str, str], list[str]]:
    """Return the chunks, their data types, and the names of the extra states."""
    chunks = torch_dist_names.chunks(weights.architecture, vocab_size, layer_spec, prefix=prefix)
    states = torch_dist_names.extra_states(weights.architecture, layer_spec, prefix=prefix)
    return chunks, stored_dtypes(chunks, weights), states


_TARGETS = {"hf": hugging_face_target, "nemo": nemo_target, "bridge": bridge_target}
