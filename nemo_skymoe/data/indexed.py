"""Write documents as Megatron's indexed datasets, and join many datasets in bounded memory."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from nemo_skymoe.data.tokenizer import TextTokenizer
from nemo_skymoe.durable.files import write_whole

_DOCUMENTS_PER_BATCH = 32
_FIXED_HEADER = 18
"""Bytes of magic, version and type of an index, which two datasets of one tokenizer share."""


def token_type(size: int) -> Any:
    """Return the smallest type of Megatron's that holds ids below `size`."""
    return np.uint16 if size <= 1 << 16 else np.int32


def files(prefix: Path) -> tuple[Path, Path]:
    """Return a dataset's data file and index file."""
    return prefix.with_name(prefix.name + ".bin"), prefix.with_name(prefix.name + ".idx")


def write_documents(tokenizer: TextTokenizer, texts: Iterable[str], prefix: Path) -> tuple[int, int]:
    """Write one document per text, each closed by the end of document.

    Returns:
        The numbers of documents and of tokens. One token of each document is its end.
    """
    data, index = files(prefix)
    builder = IndexedDatasetBuilder(str(data), dtype=token_type(tokenizer.size))
    documents = tokens = 0
    for batch in _batches(texts):
        for ids in tokenizer.encode(batch):
            document: Any = np.array([*ids, tokenizer.end_of_document], dtype=builder.dtype)
            builder.add_document(document, [len(document)])
            documents, tokens = documents + 1, tokens + len(document)
    builder.finalize(str(index))
    return documents, tokens


def join(prefixes: Sequence[Path], target: Path) -> None:
    """Write the datasets at `prefixes`, none of them empty, one after the other as `target`.

    Both files appear when they are complete and on the disk, the index last.
    """
    data, index = files(target)

    def copy_data(file: Any) -> None:
        for prefix in prefixes:
            with files(prefix)[0].open("rb") as source:
                shutil.copyfileobj(source, file, 1 << 20)

    write_whole(data, copy_data)
    write_whole(index, lambda file: _write_index(file, prefixes))


def _write_index(file: Any, prefixes: Sequence[Path]) -> None:
    """Write the index section by section. Each joins the datasets' sections, with earlier counts added."""
    counts = [(len(each.sequence_lengths), len(each.document_indices) - 1) for each in _open(prefixes)]
    with files(prefixes[0])[1].open("rb") as first:
        file.write(first.read(_FIXED_HEADER))
    sequences, documents = (sum(column) for column in zip(*counts, strict=True))
    file.write(np.array([sequences, documents + 1], dtype=np.uint64).tobytes())
    for dataset in _open(prefixes):
        file.write(np.asarray(dataset.sequence_lengths, dtype=np.int32).tobytes())
    offset = 0
    for prefix, dataset in zip(prefixes, _open(prefixes), strict=True):
        file.write((np.asarray(dataset.index.sequence_pointers, dtype=np.int64) + offset).tobytes())
        offset += files(prefix)[0].stat().st_size
    file.write(np.zeros(1, dtype=np.int64).tobytes())
    offset = 0
    for (count, _), dataset in zip(counts, _open(prefixes), strict=True):
        file.write((np.asarray(dataset.document_indices[1:], dtype=np.int64) + offset).tobytes())
        offset += count


def _open(prefixes: Sequence[Path]) -> Iterator[IndexedDataset]:
    return (IndexedDataset(str(prefix)) for prefix in prefixes)


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    remaining = iter(texts)
    while batch := list(islice(remaining, _DOCUMENTS_PER_BATCH)):
        yield batch
