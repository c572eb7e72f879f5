"""Opening a checkpoint in Hugging Face's form, of which everything that is not the model's own is set aside or refused."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import replace
from pathlib import Path

from nemo_skymoe.checkpoint.description import Description
from nemo_skymoe.checkpoint.hugging_face import configuration
from nemo_skymoe.checkpoint.hugging_face.foreign_tensors import refuse_foreign_tensors, refuse_quantised_files
from nemo_skymoe.checkpoint.hugging_face.fp8 import BLOCK_SCALES, EIGHT_BITS, SCALE, Dequantized, block_of
from nemo_skymoe.checkpoint.hugging_face.names import EMBEDDING, HEAD, chunks
from nemo_skymoe.checkpoint.hugging_face.storage import open_storage
from nemo_skymoe.checkpoint.tensors.mapping import StoredWeights, listed
from nemo_skymoe.checkpoint.tensors.model import ITEM_SIZES, TensorInfo
from nemo_skymoe.checkpoint.tensors.redundant import one_embedding, without_buffers
from nemo_skymoe.checkpoint.tensors.regions import FileStorage
from nemo_skymoe.checkpoint.tensors.storage_view import StorageView
from nemo_skymoe.durable.errors import CheckpointError

logger = logging.getLogger(__name__)

IGNORED = (
    ".rotary_emb.cos_cached",
    ".rotary_emb.sin_cached",
    ".act_scale",
    ".input_scale",
    ".kv_scale",
    ".k_scale",
    ".v_scale",
)
"""Tensors that say nothing about the weights: buffers computed anew, and scales of activations."""


def open_hugging_face(folder: Path) -> tuple[StoredWeights, Description]:
    """Return a checkpoint folder of any layout here, from its headers and its configuration.

    Raises:
        CheckpointError: The configuration is refused, or the tensors are not those of its model.
    """
    description = configuration.read(folder)
    refuse_quantised_files(folder)
    storage = open_storage(folder)
    refuse_foreign_tensors(folder, {name: info.dtype for name, info in storage.tensors.items()})
    storage = without_buffers(_without_ignored(storage), description)
    if any(
        name.endswith((SCALE, BLOCK_SCALES)) or info.dtype in EIGHT_BITS
        for name, info in storage.tensors.items()
    ):
        storage = Dequantized(storage, block_of(description.raw))
    _check_types(storage)
    tied = description.architecture.tied_embeddings
    storage = one_embedding(storage, embedding=EMBEDDING, head=HEAD, tied=tied)
    embedding = storage.tensors.get(EMBEDDING)
    if embedding is not None:
        description = _with_stored(description, embedding, folder)
    authors = any(".mlp.moe." in name for name in storage.tensors)
    naming = "authors" if authors else "qwen3_moe" if description.family == "qwen3_moe" else "skywork"
    architecture = description.architecture
    return StoredWeights(storage, architecture, chunks(architecture, naming)), description


def _check_types(storage: FileStorage) -> None:
    problems = [
        f"'{name}' is {info.dtype}" for name, info in storage.tensors.items() if info.dtype not in ITEM_SIZES
    ]
    if problems:
        raise CheckpointError(
            f"'{storage.folder}' has weights of other types than {', '.join(ITEM_SIZES)}: {listed(problems)}"
        )


def _with_stored(description: Description, embedding: TensorInfo, folder: Path) -> Description:
    """Complete the description from the weights: their data type counts, and another vocabulary is an error."""
    vocab_size = description.architecture.vocab_size
    if embedding.shape[:1] != (vocab_size,):
        raise CheckpointError(
            f"'{folder / 'config.json'}': vocab_size is {vocab_size}, the embedding is {list(embedding.shape)}"
        )
    if embedding.dtype != description.dtype:
        logger.warning(
            "%s: torch_dtype is %s, the weights are %s", folder, description.dtype, embedding.dtype
        )
    return replace(description, dtype=embedding.dtype)


def _without_ignored(storage: FileStorage) -> FileStorage:
    """Return the storage without the tensors that are known and mean nothing here; says what they were."""
    tensors = storage.tensors
    ignored = Counter(ending for ending in map(_ignored, tensors) if ending)
    for ending, count in ignored.items():
        logger.info("%s: %d tensors '*%s' are not needed", storage.folder, count, ending)
    return StorageView(storage, {name: info for name, info in tensors.items() if not _ignored(name)})


def _ignored(name: str) -> str | None:
    return next((ending for ending in IGNORED if name.endswith(ending)), None)
