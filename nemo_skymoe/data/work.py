"""The work of one data preparation: its files, cut into shards that are named by their contents."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from nemo_skymoe import __version__
from nemo_skymoe.data.documents import Piece
from nemo_skymoe.data.inputs import Input
from nemo_skymoe.data.tokenizer import TextTokenizer


@dataclass(frozen=True)
class Work:
    """The files of a command, the pieces of each shard, and the files that are not read, with the reason."""

    inputs: list[Input]
    shards: list[list[Piece]]
    tokenizer: TextTokenizer
    tokenizer_file: Path
    text_key: str
    left_out: list[tuple[Path, str]]

    @property
    def bytes(self) -> int:
        """Bytes of all shards, for the progress."""
        return sum(map(self.shard_bytes, range(len(self.shards))))

    def shard_bytes(self, number: int) -> int:
        """Return the bytes of one shard."""
        return sum(piece.bytes for piece in self.shards[number])

    def domains(self) -> dict[str, list[int]]:
        """Return the numbers of each domain's shards."""
        domains: dict[str, list[int]] = {found.domain: [] for found in self.inputs}
        for number, pieces in enumerate(self.shards):
            domains[self.inputs[pieces[0].input].domain].append(number)
        return domains

    def shard_names(self) -> list[str]:
        """Return a name for each shard, which is equal for the same pieces of the same files."""
        return [
            _checksum([[*_signature(self.inputs[piece.input]), piece.start, piece.stop] for piece in pieces])[
                :16
            ]
            for pieces in self.shards
        ]

    def inputs_checksum(self) -> str:
        """Return a checksum that is equal for the same files in the same domains."""
        return _checksum([[found.domain, *_signature(found)] for found in self.inputs])

    @cached_property
    def tokenizer_checksum(self) -> str:
        """Return the sha256 of the tokenizer's file."""
        return hashlib.sha256(self.tokenizer_file.read_bytes()).hexdigest()

    def identity(self, shard_bytes: int) -> dict[str, Any]:
        """Return what has to be equal for a shard to be of use. Its inputs are in its name."""
        return {
            "command": "preprocess",
            "version": __version__,
            "tokenizer": self.tokenizer_checksum,
            "end_of_document": self.tokenizer.end_of_document,
            "text_key": self.text_key,
            "shard_bytes": shard_bytes,
        }


def _signature(found: Input) -> list[Any]:
    return [str(found.path), found.format, found.size, found.modified]


def _checksum(values: Any) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()
