"""The demonstration corpus: sources of Python's standard library as Megatron datasets.

Real text (English documentation and code) that is on every machine with Python: nothing is downloaded. One document
per source file, each ended by `</s>`; whole files are held out for validation, chosen by a hash of their name.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset
from tokenizers import Tokenizer

from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.data import byte_level
from nemo_skymoe.data.indexed import write_documents
from nemo_skymoe.data.standard_library import read_sources
from nemo_skymoe.data.tokenizer import HuggingFaceTokenizer
from nemo_skymoe.durable.errors import CheckpointError
from nemo_skymoe.durable.files import write_small

MANIFEST = "corpus.json"
_FORMAT = 1


@dataclass(frozen=True)
class Corpus:
    """A finished corpus; its `corpus.json` holds the same fields.

    `fingerprint` identifies the text, the size of the vocabulary and the split.
    """

    directory: Path
    fingerprint: str
    python: str
    vocab_size: int
    valid_fraction: float
    train_files: int
    valid_files: int
    train_bytes: int
    valid_bytes: int
    train_tokens: int = 0
    valid_tokens: int = 0

    @property
    def text_bytes(self) -> int:
        """Bytes of UTF-8 text in both splits."""
        return self.train_bytes + self.valid_bytes

    @property
    def train_prefix(self) -> Path:
        """Megatron's path prefix of the training split, which `.bin` and `.idx` follow."""
        return self.directory / "train_text_document"

    @property
    def valid_prefix(self) -> Path:
        """Megatron's path prefix of the held-out split."""
        return self.directory / "valid_text_document"

    @property
    def tokenizer(self) -> Path:
        """Folder that `AutoTokenizer.from_pretrained` loads."""
        return self.directory / "tokenizer"


def build_corpus(
    directory: Path,
    vocab_size: int = 2048,
    valid_fraction: float = 0.05,
    progress: Callable[[str], None] | None = None,
    *,
    files: Sequence[str] | None = None,
) -> Corpus:
    """Write the corpus into `directory`, or return the one that is there if it is the one asked for.

    In CPython 3.11.7 it has 606 files of 9.9 MB, of which 30 (0.35 MB) are held out. Debian's 3.11 without its optional
    packages has 8.7 MB, and CPython 3.12 has 9.3 MB. The byte-level BPE is trained on the whole training split and
    never sees the held-out one. `corpus.json` is written last, because a folder without it does not load.

    Args:
        directory: The folder, which is made if it does not exist. Only files of the corpus are written there.
        vocab_size: Number of tokens, including the three special ones: 259 to 65536.
        valid_fraction: Expected share of *files* to hold out, between 0 and 1. The share of bytes differs.
        progress: Called with one line before each step.
        files: Names relative to the standard library instead of all of it, of any size (for tests).

    Raises:
        ConfigurationError: A bad argument, too little text, or a finished corpus of another kind in `directory`.
    """
    say = progress or (lambda line: None)
    directory = Path(directory)
    _check_numbers(vocab_size, valid_fraction)
    texts = read_sources(files)
    train, valid = _split(texts, valid_fraction)
    fingerprint = _fingerprint(texts, vocab_size, valid_fraction)
    if (finished := _finished(directory, fingerprint)) is not None:
        say(f"{directory} already holds this corpus")
        return finished
    _make_directory(directory)
    say(f"training a tokenizer of {vocab_size} tokens on {_utf8_bytes(train) / 1e6:.1f} MB of text")
    tokenizer = byte_level.train(train, vocab_size)
    corpus = Corpus(
        directory=directory,
        fingerprint=fingerprint,
        python=platform.python_version(),
        vocab_size=vocab_size,
        valid_fraction=valid_fraction,
        train_files=len(train),
        valid_files=len(valid),
        train_bytes=_utf8_bytes(train),
        valid_bytes=_utf8_bytes(valid),
    )
    return _write_corpus(corpus, tokenizer, train, valid, say)


def load_corpus(directory: Path) -> Corpus:
    """Return the finished corpus in `directory`; a CheckpointError says how to make a missing one."""
    corpus = _read_manifest(Path(directory))
    if corpus is None:
        raise CheckpointError(f"no finished corpus in {directory}, make it with: skymoe corpus {directory}")
    return corpus


def is_held_out(name: str, valid_fraction: float) -> bool:
    """Say whether the file `name` (relative, with `/`) belongs to the held-out split, the same on every machine."""
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < valid_fraction * 2**64


def validation_batches(
    corpus: Corpus, seq_length: int, batch_size: int, count: int
) -> Iterator[dict[str, torch.Tensor | None]]:
    """Return the first `count` batches of the held-out text, read as one stream in file order, without NeMo.

    Batch tensors are [batch_size, seq_length]: int64 `tokens`, `labels` (the next tokens) and `position_ids`,
    float32 `loss_mask` of ones; `attention_mask` is None, the causal mask is left to the model.

    Raises:
        ConfigurationError: The held-out split has fewer than count * batch_size * seq_length + 1 tokens.
    """
    needed = count * batch_size * seq_length + 1
    if needed > corpus.valid_tokens:
        raise ConfigurationError(
            f"{count} validation batches of {batch_size} x {seq_length} need {needed} tokens: expected at most the "
            f"{corpus.valid_tokens} held out in {corpus.directory}"
        )
    # Named, so that it outlives the copy: the arrays it returns point into a file mapping that it unmaps when freed.
    dataset = IndexedDataset(str(corpus.valid_prefix))
    documents: Any = dataset[:]
    stream = torch.from_numpy(np.concatenate(documents)[:needed].astype(np.int64))
    shape = (count, batch_size, seq_length)
    position_ids = torch.arange(seq_length).expand(batch_size, seq_length)
    return (
        {
            "tokens": tokens,
            "labels": labels,
            "position_ids": position_ids.clone(),
            "loss_mask": torch.ones(batch_size, seq_length),
            "attention_mask": None,
        }
        for tokens, labels in zip(stream[:-1].view(shape), stream[1:].view(shape), strict=True)
    )


def _check_numbers(vocab_size: int, valid_fraction: float) -> None:
    smallest = byte_level.SMALLEST
    if not smallest <= vocab_size <= 2**16:
        raise ConfigurationError(f"vocab_size is {vocab_size}: expected {smallest} to {2**16}")
    if not 0 < valid_fraction < 1:
        raise ConfigurationError(f"valid_fraction is {valid_fraction}: expected a number between 0 and 1")


def _split(texts: dict[str, str], valid_fraction: float) -> tuple[list[str], list[str]]:
    train = [text for name, text in texts.items() if not is_held_out(name, valid_fraction)]
    valid = [text for name, text in texts.items() if is_held_out(name, valid_fraction)]
    if not train or not valid:
        raise ConfigurationError(
            f"valid_fraction {valid_fraction} splits {len(texts)} files into {len(train)} for training and "
            f"{len(valid)} held out: expected at least one of each"
        )
    return train, valid


def _finished(directory: Path, fingerprint: str) -> Corpus | None:
    """Return the corpus of this fingerprint if it is there already, and refuse another one."""
    finished = _read_manifest(directory)
    if finished is not None and finished.fingerprint != fingerprint:
        raise ConfigurationError(
            f"{directory} holds another corpus (vocab_size {finished.vocab_size}, valid_fraction "
            f"{finished.valid_fraction}, Python {finished.python}): expected a new or empty directory"
        )
    return finished


def _make_directory(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(f"corpus directory {directory}: {error.strerror}") from error
    if not os.access(directory, os.W_OK):
        raise ConfigurationError(f"corpus directory {directory}: expected one that can be written")


def _fingerprint(texts: dict[str, str], vocab_size: int, valid_fraction: float) -> str:
    request = json.dumps([_FORMAT, vocab_size, valid_fraction, texts])
    return hashlib.blake2b(request.encode(), digest_size=8).hexdigest()


def _utf8_bytes(texts: Iterable[str]) -> int:
    return sum(len(text.encode()) for text in texts)


def _write_corpus(
    corpus: Corpus, tokenizer: Tokenizer, train: list[str], valid: list[str], say: Callable[[str], None]
) -> Corpus:
    manifest = corpus.directory / MANIFEST
    manifest.unlink(missing_ok=True)
    byte_level.save(tokenizer, corpus.tokenizer)
    say(f"tokenizing {len(train)} files for training")
    ended = HuggingFaceTokenizer(tokenizer, byte_level.END_OF_DOCUMENT)
    _, train_tokens = write_documents(ended, train, corpus.train_prefix)
    say(f"tokenizing {len(valid)} held-out files")
    _, valid_tokens = write_documents(ended, valid, corpus.valid_prefix)
    corpus = replace(corpus, train_tokens=train_tokens, valid_tokens=valid_tokens)
    say(f"writing {MANIFEST}: {train_tokens + valid_tokens} tokens")
    write_small(manifest, (json.dumps(asdict(corpus) | {"directory": "."}, indent=2) + "\n").encode())
    return corpus


def _read_manifest(directory: Path) -> Corpus | None:
    """Return the corpus in `directory`, or None if its manifest or a file is missing, or a size is wrong."""
    try:
        corpus = Corpus(**json.loads((directory / MANIFEST).read_text()) | {"directory": directory})
        splits = ((corpus.train_prefix, corpus.train_tokens), (corpus.valid_prefix, corpus.valid_tokens))
        for prefix, tokens in splits:
            if prefix.with_suffix(".bin").stat().st_size != tokens * np.dtype(np.uint16).itemsize:
                return None
            prefix.with_suffix(".idx").stat()
        (corpus.tokenizer / "tokenizer.json").stat()
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    return corpus
