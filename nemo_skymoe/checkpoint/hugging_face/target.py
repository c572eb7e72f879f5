"""Writing a Hugging Face model: safetensors shards and, when all are there, their index."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import cached_property
from types import MappingProxyType

from nemo_skymoe.checkpoint.hugging_face.safetensors_header import DTYPES
from nemo_skymoe.checkpoint.hugging_face.storage import INDEX, SINGLE
from nemo_skymoe.checkpoint.tensors.mapping import Chunk, assemble
from nemo_skymoe.checkpoint.tensors.model import Weights
from nemo_skymoe.checkpoint.tensors.regions import tensor_bytes
from nemo_skymoe.checkpoint.tensors.target import TargetFile, chunk_bytes, contiguous
from nemo_skymoe.durable.errors import ConfigurationError
from nemo_skymoe.durable.output_file import OutputFile

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ALIGNMENT = 8


class HuggingFaceTarget:
    """Shards as `save_pretrained` makes them: tensors in the table's order, a new shard before `shard_bytes` is passed.

    Args:
        chunks: Whole tensors.
        dtypes: Data type of each by name (`target.stored_dtypes`).
        shard_bytes: Largest shard; a larger tensor has one of its own.
        extras: Further files by path: configuration, tokenizer, code.
    """

    def __init__(
        self,
        chunks: Iterable[Chunk],
        dtypes: Mapping[str, str],
        shard_bytes: int = 5_000_000_000,
        extras: Mapping[str, bytes] = MappingProxyType({}),
    ):
        self.chunks, self.dtypes, self.extras = tuple(chunks), dict(dtypes), dict(extras)
        self._shard_bytes = shard_bytes
        if shard_bytes < 1:
            raise ConfigurationError(f"shard_bytes is {shard_bytes}, expected a positive number")
        pieces = [chunk.name for chunk in self.chunks if chunk.index]
        if pieces:
            raise ConfigurationError(f"'{pieces[0]}' is a piece of a tensor, expected whole tensors")

    @property
    def bytes(self) -> int:
        """The number that `Target.bytes` describes."""
        headers = sum(len(self._header(file)) for file in self.files())
        return self._total + headers + sum(map(len, self.extras.values()))

    @property
    def _total(self) -> int:
        return sum(self._chunk_bytes(chunk) for chunk in self.chunks)

    def files(self) -> tuple[TargetFile, ...]:
        """Return the files that `Target.files` describes."""
        return self._files

    @cached_property
    def _files(self) -> tuple[TargetFile, ...]:
        shards: list[list[Chunk]] = [[]]
        size = 0
        for chunk in self.chunks:
            if shards[-1] and size + self._chunk_bytes(chunk) > self._shard_bytes:
                shards.append([])
                size = 0
            shards[-1].append(chunk)
            size += self._chunk_bytes(chunk)
        if len(shards) == 1:
            return (TargetFile(SINGLE, tuple(shards[0])),)
        return tuple(
            TargetFile(f"model-{number:05}-of-{len(shards):05}.safetensors", tuple(shard))
            for number, shard in enumerate(shards, start=1)
        )

    def write(self, file: TargetFile, weights: Weights, output: OutputFile) -> None:
        """Write as `Target.write` says."""
        import torch

        output.write(self._header(file))
        for chunk in file.chunks:
            tensor = assemble(chunk, weights, getattr(torch, self.dtypes[chunk.tensor]))
            output.write_tensor(chunk.name, tensor_bytes(contiguous(tensor)))

    def last_files(self, sizes: Mapping[str, int]) -> dict[str, bytes]:
        """Return the index, unless there is one shard."""
        if len(self.files()) == 1:
            return {}
        shards = {chunk.tensor: file.name for file in self.files() for chunk in file.chunks}
        index = {"metadata": {"total_size": self._total}, "weight_map": dict(sorted(shards.items()))}
        return {INDEX: (json.dumps(index, indent=2) + "\n").encode()}

    def _chunk_bytes(self, chunk: Chunk) -> int:
        return chunk_bytes(chunk, self.dtypes[chunk.tensor])

    def _header(self, file: TargetFile) -> bytes:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        position = 0
        for chunk in file.chunks:
            stop = position + self._chunk_bytes(chunk)
            dtype = _NAMES[self.dtypes[chunk.tensor]]
            header[chunk.tensor] = {
                "dtype": dtype,
                "shape": chunk.shape,
                "data_offsets": (position, stop),
            }
            position = stop
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        return len(text).to_bytes(8, "little") + text
