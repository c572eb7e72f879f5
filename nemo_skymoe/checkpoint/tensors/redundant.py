"""Tensors that say again what others, or the configuration, say: accepted where they agree, refused where they do not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from nemo_skymoe.checkpoint.description import Description
from nemo_skymoe.checkpoint.tensors.regions import FileStorage
from nemo_skymoe.checkpoint.tensors.storage_view import Renamed, StorageView
from nemo_skymoe.durable.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

_ROWS = 4096
FREQUENCIES = ("rotary_emb.inv_freq", "rotary_pos_emb.inv_freq")
MASKS = (".masked_bias", ".self_attn.bias", ".attn.bias")
_OF_ALL = (None, "linear")
_OF_SOME = ("llama3", "yarn")
"""Scalings that divide all frequencies by the factor, and those that leave high ones as they are and divide low ones."""
_TOLERANCE = {"float16": 1e-2, "bfloat16": 1e-2}


def one_embedding(storage: FileStorage, *, embedding: str, head: str, tied: bool) -> FileStorage:
    """Return the storage with the tensors that a model of tied, or of separate, embedding and head has.

    Args:
        storage: The tensors of a checkpoint of any format.
        embedding: The name of the embedding.
        head: The name of the output layer. Where both are one, either may be stored, or both if they are equal.
        tied: Whether they are one, by the configuration.

    Raises:
        CheckpointError: Both are stored and differ, though tied; or one of them is missing, though separate.
    """
    stored = [name for name in (embedding, head) if name in storage.tensors]
    if not tied and len(stored) == 1:
        (missing,) = {embedding, head} - {*stored}
        raise CheckpointError(
            f"'{storage.folder}' has '{stored[0]}' but no '{missing}': set tie_word_embeddings (Megatron:"
            " share_embeddings_and_output_weights) to true if the one serves as the other, as it does not by the"
            " configuration"
        )
    if not tied:
        return storage
    return (
        Renamed(storage, {head: embedding})
        if stored == [head]
        else without_copies(storage, {head: embedding})
    )


def without_copies(storage: FileStorage, copies: Mapping[str, str]) -> FileStorage:
    """Return the storage without tensors that repeat another, which are read and compared bit by bit.

    Args:
        storage: The tensors of a checkpoint of any format.
        copies: The name of the original by that of its copy; copies that are not there do not matter.

    Raises:
        CheckpointError: A copy differs from its original.
    """
    tensors = storage.tensors
    there = {copy: name for copy, name in copies.items() if copy in tensors and name in tensors}
    for copy, name in there.items():
        if tensors[copy] != tensors[name] or not _same(storage, copy, name):
            raise CheckpointError(
                f"'{copy}' in '{storage.folder}' differs from '{name}', but the configuration says that they are tied:"
                " set tie_word_embeddings (Megatron: share_embeddings_and_output_weights) to false if both are meant"
            )
    return _hidden(storage, there)


def without_buffers(storage: FileStorage, description: Description) -> FileStorage:
    """Return the storage without rotary frequencies and causal masks, which are compared with what the model computes.

    Raises:
        CheckpointError: They are other ones.
    """
    frequencies = [name for name in storage.tensors if name.endswith(FREQUENCIES)]
    masks = [name for name in storage.tensors if name.endswith(MASKS)]
    for name in frequencies:
        _check_frequencies(storage, name, description)
    for name in masks:
        _check_mask(storage, name)
    return _hidden(storage, [*frequencies, *masks])


def _hidden(storage: FileStorage, names: Iterable[str]) -> FileStorage:
    hidden = set(names)
    if not hidden:
        return storage
    return StorageView(storage, {name: info for name, info in storage.tensors.items() if name not in hidden})


def _same(storage: FileStorage, copy: str, name: str) -> bool:
    import torch

    rows = storage.tensors[name].shape[0]
    for start in range(0, rows, _ROWS):
        part = (start, min(start + _ROWS, rows))
        ours, theirs = storage.read(name, rows=part), storage.read(copy, rows=part)
        if not torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8)):
            return False
    return True


def _check_frequencies(storage: FileStorage, name: str, description: Description) -> None:
    """theta ** (-2 i / head size), as float32 or rounded to 16 bits; positions are scaled there or elsewhere.

    A scaling that divides some of them leaves each in the range from what it was to what the factor makes of it.
    """
    import torch

    scaling = description.rope_scaling or {}
    kind, factor = scaling.get("rope_type"), scaling.get("factor", 1.0)
    if kind not in (*_OF_ALL, *_OF_SOME) or not isinstance(factor, int | float):
        return
    head = description.architecture.head_size
    exponents = torch.arange(0, head, 2, dtype=torch.float64) / head
    expected = description.rope_theta**-exponents
    found: Tensor = storage.read(name).double().reshape(-1)
    tolerance = _TOLERANCE.get(storage.tensors[name].dtype, 1e-5)
    if found.shape == expected.shape:
        least = expected / factor
        within = found.clamp(least, expected)  # rounding leads a little outside of the range
        for right in (within,) if kind in _OF_SOME else (expected, least):
            if torch.allclose(found, right, rtol=tolerance, atol=1e-7):
                return
    raise CheckpointError(
        f"'{name}' in '{storage.folder}' is not what rope_theta {description.rope_theta:g} and heads of {head} give:"
        " expected the rotary frequencies of the configuration, or none"
    )


def _check_mask(storage: FileStorage, name: str) -> None:
    """A causal mask of ones, or the one number that hidden positions get."""
    import torch

    mask = storage.read(name)
    square = (
        mask.reshape(mask.shape[-2:]) if mask.dim() >= 2 and mask.numel() == mask.shape[-1] ** 2 else None
    )
    causal = square is not None and torch.equal(square != 0, torch.ones_like(square, dtype=torch.bool).tril())
    if not causal and mask.numel() != 1:
        raise CheckpointError(
            f"'{name}' in '{storage.folder}' is no causal mask, and has no place in the model"
        )
