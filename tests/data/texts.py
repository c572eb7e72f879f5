"""Documents, written in the forms that are read and read back as Megatron reads them."""

import bz2
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from megatron.core.datasets.indexed_dataset import IndexedDataset
from transformers import AutoTokenizer

from nemo_skymoe.data import preprocess
from nemo_skymoe.data.manifest import Domain

TEXTS = ["Ein Satz.", "天工是大模型。", "def f():\n\treturn '</s>'", "x" * 300, "line\r\nbreak\u2028"]


def jsonl(path: Path, texts: list[str], key: str = "text") -> Path:
    path.write_text("".join(json.dumps({key: text}) + "\n" for text in texts))
    return path


def read(output: Path, domain: str = "text") -> list[str]:
    """Texts of a dataset, checked document by document."""
    made = AutoTokenizer.from_pretrained(output / "tokenizer")
    dataset = IndexedDataset(str(output / domain))
    assert np.array_equal(dataset.document_indices, np.arange(len(dataset) + 1))
    documents: list[Any] = [dataset[number] for number in range(len(dataset))]
    assert all(document[-1] == 2 and (document[:-1] > 2).all() for document in documents)
    return [made.decode(document[:-1]) for document in documents]


def run(tmp_path: Path, tokenizer: Path, *inputs: str, **options: Any) -> dict[str, Domain]:
    return preprocess.preprocess(inputs, tmp_path / "out", tokenizer, **options)


def zstd(data: bytes) -> bytes:
    """Two frames, as `cat a.zst b.zst` makes them."""
    codec = pyarrow.Codec("zstd")
    half = len(data) // 2
    return b"".join(codec.compress(part, asbytes=True) for part in (data[:half], data[half:]))


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".zst": zstd,
}
