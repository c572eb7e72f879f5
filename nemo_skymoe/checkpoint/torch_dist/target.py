"""Writing a `torch_dist` checkpoint as NeMo, Bridge and Megatron load it: a file a chunk, the metadata last."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from types import MappingProxyType
from typing import Any

from nemo_skymoe.checkpoint.tensors.mapping import Chunk, assemble
from nemo_skymoe.checkpoint.tensors.model import Weights
from nemo_skymoe.checkpoint.tensors.target import TargetFile, chunk_bytes, contiguous
from nemo_skymoe.checkpoint.torch_dist.archive import archive
from nemo_skymoe.checkpoint.torch_dist.storage import CONFIG, METADATA, WEIGHTS
from nemo_skymoe.durable.output_file import OutputFile

_CONFIG = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
_ARCHIVE_BYTES = 1536
"""About the bytes that `torch.save` adds to a tensor."""


class TorchDistTarget:
    """A folder of tensors: `__<n>_0.distcp` for the n-th chunk, without random names or absolute paths.

    Args:
        chunks: Tensors, or pieces of stacked ones.
        dtypes: Data type of each tensor by name (`target.stored_dtypes`).
        extra_states: Names of the empty extra states that Megatron expects; they share one file.
        extras: Further files by path in the output folder, such as `context/`.
        folder: The folder of the tensors in the output folder.
    """

    common_state: Mapping[str, float] = MappingProxyType({})
    """What Megatron keeps beside the tensors."""

    def __init__(
        self,
        chunks: Iterable[Chunk],
        dtypes: Mapping[str, str],
        extra_states: Sequence[str] = (),
        extras: Mapping[str, bytes] = MappingProxyType({}),
        *,
        folder: str = WEIGHTS,
    ):
        self.chunks, self.dtypes, self.extras = tuple(chunks), dict(dtypes), dict(extras)
        self.extra_states, self.folder = tuple(extra_states), folder

    @property
    def bytes(self) -> int:
        """The number that `Target.bytes` describes."""
        tensors = sum(chunk_bytes(chunk, self.dtypes[chunk.tensor]) for chunk in self.chunks)
        return tensors + _ARCHIVE_BYTES * len(self.chunks) + sum(map(len, self.extras.values()))

    def files(self) -> tuple[TargetFile, ...]:
        """Return the files that `Target.files` describes."""
        return self._files

    @cached_property
    def _files(self) -> tuple[TargetFile, ...]:
        return tuple(
            TargetFile(f"{self.folder}/{_file_name(number)}", (chunk,))
            for number, chunk in enumerate(self.chunks)
        )

    def write(self, file: TargetFile, weights: Weights, output: OutputFile) -> None:
        """Write as `Target.write` says."""
        import torch

        (chunk,) = file.chunks
        tensor = assemble(chunk, weights, getattr(torch, self.dtypes[chunk.tensor]))
        saved = contiguous(tensor).detach().view((1,) * len(chunk.index) + chunk.chunk_shape)
        before, memory, after = archive(saved)
        output.write(before)
        output.write_tensor(chunk.name, memory)
        output.write(after)

    def last_files(self, sizes: Mapping[str, int]) -> dict[str, bytes]:
        """Return the extra states, what Megatron keeps beside the tensors, and the metadata that finds them all."""
        import torch

        extra_state, common = io.BytesIO(), io.BytesIO()
        torch.save([None], extra_state)
        torch.save(dict(self.common_state), common)
        files = {_file_name(len(self.chunks)): extra_state.getvalue()} if self.extra_states else {}
        files["common.pt"] = common.getvalue()
        files[CONFIG] = json.dumps(_CONFIG).encode()
        files[METADATA] = self._metadata(sizes, len(extra_state.getvalue()))
        return {f"{self.folder}/{name}": data for name, data in files.items()}

    def _metadata(self, sizes: Mapping[str, int], extra_state_bytes: int) -> bytes:
        """Return the pickle that torch.distributed.checkpoint reads first: the same bytes for the same table."""
        from torch import Size
        from torch.distributed.checkpoint.filesystem import _StorageInfo
        from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

        entries: dict[str, Any] = {}
        places: dict[MetadataIndex, _StorageInfo] = {}
        for number, (chunk, file) in enumerate(zip(self.chunks, self.files(), strict=True)):
            rest = (0,) * len(chunk.chunk_shape)
            offsets = Size((*chunk.index, *rest))
            entry = entries.setdefault(chunk.tensor, self._tensor_metadata(chunk))
            entry.chunks.append(_chunk_metadata(offsets, chunk))
            places[MetadataIndex(chunk.tensor, offsets)] = _StorageInfo(
                _file_name(number), 0, sizes[file.name]
            )
        for name in self.extra_states:
            entries[name] = BytesStorageMetadata()
            places[MetadataIndex(name)] = _StorageInfo(_file_name(len(self.chunks)), 0, extra_state_bytes)
        return pickle.dumps(Metadata(entries, None, places, None, "1.0.0"), protocol=4)

    def _tensor_metadata(self, chunk: Chunk) -> Any:
        import torch
        from torch.distributed.checkpoint.metadata import TensorProperties, TensorStorageMetadata

        properties = TensorProperties(getattr(torch, self.dtypes[chunk.tensor]))
        return TensorStorageMetadata(properties, torch.Size(chunk.shape), [])


def _chunk_metadata(offsets: Any, chunk: Chunk) -> Any:
    from torch import Size
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

    return ChunkStorageMetadata(offsets, Size((1,) * len(chunk.index) + chunk.chunk_shape))


def _file_name(number: int) -> str:
    return f"__{number}_0.distcp"
