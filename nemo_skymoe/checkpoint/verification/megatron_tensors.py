"""A `torch_dist` folder's tensors by meaning, read with torch's own metadata and `torch.load`."""

import io
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from nemo_skymoe.architecture import Architecture
from nemo_skymoe.checkpoint.verification.bits import different
from nemo_skymoe.durable.errors import CheckpointError

_EMBEDDING, _HEAD = "embedding.word_embeddings.weight", "output_layer.weight"
_LAYER_NAMES = {
    "attention_norm": ("self_attention.linear_qkv.layer_norm_weight",),
    "attention_output": ("self_attention.linear_proj.weight",),
    "mlp_norm": ("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"),
    "router": ("mlp.router.weight",),
    "query_norm": ("self_attention.q_layernorm.weight",),
    "key_norm": ("self_attention.k_layernorm.weight",),
}


class MegatronModel:
    """A GPT model of Megatron-Core, its layers stacked or not, its experts [layers, experts, out, in].

    Args:
        folder: With `.metadata`, or `weights/.metadata`. The metadata is a pickle: check the folder with
            `TorchDistStorage`, which refuses all but tensors, before it is opened here.
        architecture: Heads, vocabulary, and whether embedding and head are tied, which shapes alone do not tell.
    """

    def __init__(self, folder: Path, architecture: Architecture):
        self.architecture = architecture
        self.folder = folder / "weights" if (folder / "weights").is_dir() else folder
        self._metadata = FileSystemReader(self.folder).read_metadata()
        entries = self._metadata.state_dict_metadata
        self._prefix = "module." if any(name.startswith("module.") for name in entries) else ""
        start = (f"{self._prefix}decoder.", f"{self._prefix}embedding.", f"{self._prefix}output_layer.")
        self._sizes = {
            name: tuple(entry.size)
            for name, entry in entries.items()
            if name.startswith(start) and isinstance(entry, TensorStorageMetadata)
        }
        self._read: set[tuple[str, tuple[int, ...]]] = set()
        self._last: tuple[Any, Tensor] | None = None
        self._payload: tuple[MetadataIndex, Tensor] | None = None
        self._padding: list[str] = []

    def tensor(self, kind: str, layer: int | None = None, expert: int | None = None) -> Tensor:
        """Return one matrix or vector. Rows of vocabulary beyond the model's must be zero.

        Raises:
            KeyError: The checkpoint has none of that name.
            CheckpointError: It is a tied embedding, and stored twice with different values.
        """
        if layer is None:
            return self._of_model(kind)
        if kind in ("query", "key", "value"):
            return self._of_attention(kind, "weight", layer)
        if kind.endswith("_bias"):
            return self._of_attention(kind.removesuffix("_bias"), "bias", layer)
        if kind in ("gate", "up", "down"):
            experts = "" if expert is None else "experts.experts."
            fused = self._stored(
                (f"mlp.{experts}linear_fc{2 if kind == 'down' else 1}.weight",), layer, expert
            )
            return fused if kind == "down" else fused.chunk(2)[kind == "up"]
        return self._stored(_LAYER_NAMES[kind], layer)

    def _of_model(self, kind: str) -> Tensor:
        if kind == "final_norm":
            return self._gathered(f"{self._prefix}decoder.final_layernorm.weight", ())
        embedding, head = (self._prefix + name for name in (_EMBEDDING, _HEAD))
        if kind == "embedding" and self.architecture.tied_embeddings:
            tensor = self._tied_embedding(embedding, head)
        else:
            tensor = self._gathered(embedding if kind == "embedding" else head, ())
        vocabulary = self.architecture.vocab_size
        padding = tensor[vocabulary:].contiguous().view(torch.uint8)
        if padding.any():
            self._padding.append(f"{kind}: rows from {vocabulary} are padding, expected zeros")
        return tensor[:vocabulary]

    def _tied_embedding(self, embedding: str, head: str) -> Tensor:
        """Return the one that is stored; where both are, they are the same."""
        if head not in self._sizes:
            return self._gathered(embedding, ())
        copy = self._gathered(head, ())
        if embedding not in self._sizes:
            return copy
        tensor = self._gathered(embedding, ())
        if difference := different(tensor, copy):
            raise CheckpointError(
                f"'{head}' in '{self.folder}' differs from '{embedding}', to which it is tied: {difference}"
            )
        return tensor

    def _of_attention(self, kind: str, tensor: str, layer: int) -> Tensor:
        """Group by group: the group's query heads, its key, its value. A bias is fused as its matrix is."""
        sizes = self.architecture
        fused = self._stored((f"self_attention.linear_qkv.{tensor}",), layer)
        row = fused.shape[1:]
        groups = fused.view(sizes.query_groups, -1, sizes.head_size, *row)
        part = {"query": groups[:, :-2], "key": groups[:, -2], "value": groups[:, -1]}[kind]
        return part.reshape(-1, *row)

    def _stored(self, names: tuple[str, ...], layer: int, expert: int | None = None) -> Tensor:
        places = () if expert is None else (expert,)
        for name in names:
            stacked = f"{self._prefix}decoder.layers.{name}"
            if stacked in self._sizes:
                return self._gathered(stacked, (layer, *places))
            apart = f"{self._prefix}decoder.layers.{layer}.{name}"
            if apart in self._sizes:
                return self._gathered(apart, places)
        raise KeyError(f"{self._prefix}decoder.layers.{names[0]}")

    def _gathered(self, name: str, index: tuple[int, ...]) -> Tensor:
        """`tensor[index]` from the pieces that it was saved in."""
        if self._last is not None and self._last[0] == (name, index):
            return self._last[1]
        entry = self._metadata.state_dict_metadata[name]
        assert isinstance(entry, TensorStorageMetadata)
        whole = torch.empty(entry.size[len(index) :], dtype=entry.properties.dtype)
        missing = whole.numel()
        for chunk in entry.chunks:
            ours = [
                slice(place - start, place - start + 1)
                for place, start in zip(index, chunk.offsets, strict=False)
            ]
            if any(not 0 <= s.start < size for s, size in zip(ours, chunk.sizes, strict=False)):
                continue
            piece = self._load(MetadataIndex(name, chunk.offsets))[tuple(ours)].reshape(
                chunk.sizes[len(index) :]
            )
            offsets = chunk.offsets[len(index) :]
            whole[tuple(slice(o, o + s) for o, s in zip(offsets, piece.shape, strict=True))] = piece
            missing -= piece.numel()
        if missing:
            raise CheckpointError(f"'{name}'{list(index)} in '{self.folder}' is not all there, or twice")
        self._read.add((name, index))
        self._last = (name, index), whole
        return whole

    def _load(self, index: MetadataIndex) -> Tensor:
        if self._payload is not None and self._payload[0] == index:
            return self._payload[1]
        place = self._metadata.storage_data[index]
        with open(self.folder / place.relative_path, "rb") as file:
            file.seek(place.offset)
            stored = io.BytesIO(file.read(place.length))
        try:
            tensor = torch.load(stored, map_location="cpu", weights_only=True)
        except UnpicklingError:  # at length, torch would say how to load it unsafely
            raise CheckpointError(
                f"'{place.relative_path}' has no tensor where the metadata says that '{index.fqn}' is, at byte {place.offset:,}"
            ) from None
        self._payload = index, tensor
        return tensor

    def problems(self) -> list[str]:
        """Padding that is not zero, and what was never asked for."""
        unread = sorted(set(self._every_place()) - self._read)
        return self._padding + [f"'{name}'{list(index)} has no place in the model" for name, index in unread]

    def _every_place(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        for name, size in self._sizes.items():
            inner = name.removeprefix(f"{self._prefix}decoder.")
            leading = int(inner.startswith("layers.") and not inner.split(".")[1].isdigit())
            leading += inner.startswith("layers.") and ".experts.experts." in inner
            yield from ((name, index) for index in product(*map(range, size[:leading])))
