"""Read the documents of a piece of a file, each with its number there. Anything else comes with the reason."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from nemo_skymoe.data.inputs import Input, open_bytes, parse_record, read_errors
from nemo_skymoe.durable.errors import CheckpointError

EMPTY, UNDECODABLE = "empty", "undecodable"


@dataclass(frozen=True)
class Piece:
    """The part of input number `input` that begins at `start` and before `stop`.

    These are bytes, or row groups of a parquet file. A compressed file, or one that is a document, is one piece.
    """

    input: int
    start: int
    stop: int
    bytes: int
    """Bytes of work, for the progress."""


@dataclass(frozen=True)
class Document:
    """A document. `number` is its line, row or 1, counted in its piece. Without text, `rejected` says why."""

    number: int
    text: str
    rejected: str = ""


def read(found: Input, piece: Piece, text_key: str) -> Iterator[Document]:
    """Yield every document of a piece.

    Raises:
        CheckpointError: The file cannot be read to its end.
    """
    try:
        if found.format == "parquet":
            records = _rows(found, piece, text_key)
        elif found.format == "text":
            records = _whole(found)
        else:
            records = _lines(found, piece, text_key)
        for number, content in enumerate(records, start=1):
            yield _document(number, content)
    except read_errors() as reason:
        raise CheckpointError(
            f"'{found.path}' cannot be read to its end: {reason}; copy it anew, then run the same command again"
        ) from None


def _document(number: int, content: Any) -> Document:
    if isinstance(content, Exception):
        return Document(number, "", f"{UNDECODABLE}: {content}")
    if content is None:
        return Document(number, "", f"{EMPTY}: null")
    if not isinstance(content, str):
        return Document(number, "", f"{UNDECODABLE}: the text is a {type(content).__name__}")
    if not content.strip():
        return Document(number, "", EMPTY)
    try:
        content.encode()
    except UnicodeEncodeError as reason:  # half a surrogate pair, which JSON can spell
        return Document(number, "", f"{UNDECODABLE}: {reason.reason}")
    return Document(number, content)


def _whole(found: Input) -> Iterator[Any]:
    with open_bytes(found.path) as file:
        yield _decode(file.read(), first=True)


def _lines(found: Input, piece: Piece, text_key: str) -> Iterator[Any]:
    """Yield the documents of the lines that begin in the piece."""
    with open_bytes(found.path) as file:
        position = piece.start
        if position:
            file.seek(position - 1)
            position += len(file.readline()) - 1
        while (found.compressed or position < piece.stop) and (line := file.readline()):
            text = _decode(line, first=position == 0)
            position += len(line)
            if isinstance(text, str):
                yield text.rstrip("\r\n") if found.format == "lines" else _json(text, text_key)
            else:
                yield text


def _rows(found: Input, piece: Piece, text_key: str) -> Iterator[Any]:
    import pyarrow
    from pyarrow import parquet

    with parquet.ParquetFile(found.path) as file:
        groups = list(range(piece.start, piece.stop))
        # As bytes: one text that is not UTF-8 must not take its batch along.
        for batch in file.iter_batches(batch_size=1000, row_groups=groups, columns=[text_key]):
            column = batch.column(0)
            large = pyarrow.types.is_large_string(column.type)
            for value in column.cast(pyarrow.large_binary() if large else pyarrow.binary()):
                content = value.as_py()
                yield content if content is None else _decode(content)


def _decode(content: bytes, first: bool = False) -> str | ValueError:
    try:
        return content.decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError as reason:
        return reason


def _json(line: str, text_key: str) -> Any:
    if not line.strip():
        return ""
    try:
        record = parse_record(line)
    except ValueError as reason:
        return reason
    if not isinstance(record, dict) or text_key not in record:
        return ValueError(f"no key '{text_key}'")
    return record[text_key]


def first_document(inputs: Sequence[Input], text_key: str) -> Document | None:
    """Return the first document of `inputs`, or the first that was rejected, or None.

    Raises:
        CheckpointError: A file cannot be read, as far as it was.
    """
    rejected: Document | None = None
    for number, found in enumerate(inputs):
        for piece in _pieces(number, found, max(found.size, 1)):
            for document in read(found, piece, text_key):
                if not document.rejected:
                    return document
                rejected = rejected or replace(
                    document, rejected=f"{found.path}:{document.number}: {document.rejected}"
                )
    return rejected


def split(inputs: list[Input], shard_bytes: int) -> list[list[Piece]]:
    """Cut the inputs into shards of at least `shard_bytes` bytes, if their domain has as many.

    The shards depend on nothing but the files, so any number of workers writes the same bytes.
    """
    shards: list[list[Piece]] = []
    room, domain = 0, ""
    for number, found in enumerate(inputs):
        for piece in _pieces(number, found, shard_bytes):
            if room <= 0 or found.domain != domain:
                shards.append([])
                room, domain = shard_bytes, found.domain
            shards[-1].append(piece)
            room -= piece.bytes
    return shards


def _pieces(number: int, found: Input, shard_bytes: int) -> Iterator[Piece]:
    size = found.size
    if found.format == "parquet":
        from pyarrow import parquet

        metadata = parquet.read_metadata(found.path)
        for group in range(metadata.num_row_groups):
            yield Piece(number, group, group + 1, metadata.row_group(group).total_byte_size)
    elif found.compressed or found.format == "text":
        yield Piece(number, 0, size, size)
    else:
        for start in range(0, size, shard_bytes):
            stop = min(start + shard_bytes, size)
            yield Piece(number, start, stop, stop - start)
