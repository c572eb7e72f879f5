"""One shard of a data preparation: its documents as an indexed dataset, and a record of them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nemo_skymoe.data import documents, indexed
from nemo_skymoe.data.documents import Piece
from nemo_skymoe.data.work import Work
from nemo_skymoe.durable.errors import CheckpointError
from nemo_skymoe.durable.files import TEMPORARY, sync, write_small

_REPORT_BYTES = 1 << 20


@dataclass
class Record:
    """The contents of a shard. It is written after the shard's data, so a shard with a record is complete."""

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    read: list[int] = field(default_factory=list)
    """Number of lines, rows or files of each piece."""
    rejected: list[tuple[int, int, str]] = field(default_factory=list)
    """Piece, number in it, and reason."""
    files: list[int] = field(default_factory=list)
    """Bytes of data and index."""


def write(prefix: Path, pieces: Sequence[Piece], work: Work, advance: Callable[[int], None]) -> None:
    """Tokenise `pieces` into the dataset at `prefix`. `advance` is called with bytes from time to time."""
    record = Record()
    temporary = prefix.with_name(prefix.name + TEMPORARY)
    texts = _texts(pieces, work, record, advance)
    record.documents, record.tokens = indexed.write_documents(work.tokenizer, texts, temporary)
    for found in {piece.input: work.inputs[piece.input] for piece in pieces}.values():
        if not found.unchanged:
            raise CheckpointError(
                f"'{found.path}' has changed while it was read: run the same command again to read it as it is now"
            )
    for written, final in zip(indexed.files(temporary), indexed.files(prefix), strict=True):
        sync(written)
        record.files.append(written.stat().st_size)
        os.replace(written, final)
    write_small(_record_file(prefix), json.dumps(asdict(record)).encode())


def finished(prefix: Path) -> Record | None:
    """Return the record of a shard that is complete."""
    try:
        values: dict[str, Any] = json.loads(_record_file(prefix).read_bytes())
        values["rejected"] = [tuple(each) for each in values["rejected"]]
        record = Record(**values)
        sizes = [file.stat().st_size for file in indexed.files(prefix)]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
    return record if sizes == record.files else None


def files(prefix: Path) -> tuple[Path, ...]:
    """Return the files of a complete shard."""
    return (*indexed.files(prefix), _record_file(prefix))


def _record_file(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ".json")


def _texts(
    pieces: Sequence[Piece], work: Work, record: Record, advance: Callable[[int], None]
) -> Iterator[str]:
    for position, piece in enumerate(pieces):
        number = told = seen = 0
        for document in documents.read(work.inputs[piece.input], piece, work.text_key):
            number = document.number
            if document.rejected:
                record.rejected.append((position, number, document.rejected))
            else:
                size = len(document.text.encode())
                record.text_bytes += size
                seen += size
                yield document.text
            if (more := min(seen, piece.bytes) - told) >= _REPORT_BYTES:
                advance(more)
                told += more
        record.read.append(number)
        advance(piece.bytes - told)
