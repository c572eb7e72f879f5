"""Opening a `torch_dist` checkpoint of NeMo 2 or of Megatron-LM."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from nemo_skymoe.checkpoint.description import Description
from nemo_skymoe.checkpoint.mapping import StoredWeights
from nemo_skymoe.checkpoint.redundant import one_embedding, without_buffers
from nemo_skymoe.checkpoint.regions import FileStorage
from nemo_skymoe.checkpoint.torch_dist import options as torch_dist_options
from nemo_skymoe.checkpoint.torch_dist.names import EMBEDDING, HEAD, chunks, layout
from nemo_skymoe.checkpoint.torch_dist.storage import TorchDistStorage


def open_torch_dist(folder: Path, config: Path | None = None) -> tuple[StoredWeights, Description]:
    """The model in a checkpoint folder of NeMo 2 (`weights/`, `context/`) or of Megatron-LM.

    Args:
        folder: Saved at any tensor-, pipeline- and expert-parallel size.
        config: A config.json that describes the model, instead of what the checkpoint says.

    Raises:
        ConfigurationError: No checkpoint, none that says how its heads are cut, one of another kind of model, or
            tensors that are not those of the model described.
    """
    storage: FileStorage = TorchDistStorage(folder)
    saved = layout(storage)
    description = torch_dist_options.describe(folder, storage, config)
    storage = without_buffers(storage, description)
    names = {"embedding": saved.prefix + EMBEDDING, "head": saved.prefix + HEAD}
    storage = one_embedding(storage, **names, tied=description.architecture.tied_embeddings)
    return StoredWeights(
        storage, description.architecture, chunks(description.architecture, **asdict(saved))
    ), description
