"""Model weights in Megatron's `torch_dist` checkpoints, without a model and without process groups.

The format is torch.distributed.checkpoint's, beside it `metadata.json` and `common.pt`. Layers of one kind
are stacked: [layers, ...].
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from nemo_skymoe.config import ConfigurationError

WEIGHTS = "weights"
PREFIX = "module."
_METADATA = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


def weights_folder(checkpoint: Path) -> Path:
    """The folder with the tensors of a NeMo checkpoint, or of Megatron-LM's, which has no `weights/`."""
    for folder in (checkpoint / WEIGHTS, checkpoint):
        if (folder / ".metadata").is_file() and (folder / "metadata.json").is_file():
            return folder
    raise ConfigurationError(
        f"'{checkpoint}' is no torch_dist checkpoint: expected weights/.metadata and weights/metadata.json"
    )


def read_shapes(checkpoint: Path) -> dict[str, torch.Size]:
    """Names (with `module.`) and shapes of the model's tensors, from the metadata alone."""
    metadata = FileSystemReader(weights_folder(checkpoint)).read_metadata()
    return {
        name: entry.size
        for name, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata) and name.startswith(PREFIX)
    }


def read_weights(checkpoint: Path) -> dict[str, Tensor]:
    """All model tensors of a checkpoint in memory, without optimizer state."""
    reader = FileSystemReader(weights_folder(checkpoint))
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata) and name.startswith(PREFIX)
    }
    load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def empty_extra_states(linear: str, *stacked: int) -> dict[str, Any]:
    """The empty extra states (FP8 scales) that Megatron expects of a linear layer, one a layer (and expert).

    Args:
        linear: Name of the stacked weight, ending in `.weight`.
        stacked: Its leading dimensions: layers, or layers and experts.
    """
    total = ".".join(map(str, stacked))
    name = linear.removesuffix("weight") + "_extra_state/shard_"
    return {f"{name}{'.'.join(map(str, index))}_{total}": [None] for index in np.ndindex(*stacked)}


def write_weights(checkpoint: Path, entries: Mapping[str, Any]) -> None:
    """Write tensors and extra states as `checkpoint/weights`; `metadata.json`, without which nothing loads, last."""
    folder = checkpoint / WEIGHTS
    folder.mkdir(parents=True)
    save(dict(entries), storage_writer=FileSystemWriter(folder), no_dist=True)
    torch.save({}, folder / "common.pt")
    (folder / "metadata.json").write_text(json.dumps(_METADATA))
