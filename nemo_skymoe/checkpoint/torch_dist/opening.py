"""Opening a `torch_dist` checkpoint of NeMo 2 or of Megatron-LM."""

from __future__ import annotations

from dataclasses import asdict

from nemo_skymoe.checkpoint.description import Description
from nemo_skymoe.checkpoint.tensors.mapping import StoredWeights
from nemo_skymoe.checkpoint.tensors.redundant import one_embedding, without_buffers
from nemo_skymoe.checkpoint.tensors.regions import FileStorage
from nemo_skymoe.checkpoint.torch_dist.names import EMBEDDING, HEAD, Layout, chunks


def stored_weights(storage: FileStorage, saved: Layout, description: Description) -> StoredWeights:
    """Return the tensors by meaning of a model that was saved in this layout.

    Raises:
        CheckpointError: The tensors are not those of the model described.
    """
    storage = without_buffers(storage, description)
    names = {"embedding": saved.prefix + EMBEDDING, "head": saved.prefix + HEAD}
    storage = one_embedding(storage, **names, tied=description.architecture.tied_embeddings)
    return StoredWeights(storage, description.architecture, chunks(description.architecture, **asdict(saved)))
