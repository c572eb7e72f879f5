"""The demonstration corpus: sources of Python's standard library as Megatron datasets, and NeMo's data module on them.

Real text (English documentation and code) that is on every machine with Python: nothing is downloaded. One document
per source file, each ended by `</s>`; whole files are held out for validation, chosen by a hash of their name.
"""
# NeMo-Run reads the signature of `corpus_data`: no `from __future__ import annotations`, and `Optional[str]`, because
# its command line cannot parse `str | None`.

import hashlib
import json
import os
import platform
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

import numpy as np
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
from megatron.core.datasets.utils import Split
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from nemo_skymoe.config import ConfigurationError

if TYPE_CHECKING:
    from nemo.collections.llm.gpt.data.pre_training import PreTrainingDataModule

MANIFEST = "corpus.json"
MINIMUM_BYTES = 8_000_000
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")
"""Ids 0, 1 and 2, as in the tokenizer of the released Skywork models."""
END_OF_DOCUMENT = SPECIAL_TOKENS.index("</s>")
LEFT_OUT_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
LEFT_OUT_PREFIXES = ("_sysconfigdata", "config-")
_FORMAT = 1
_FILES_PER_BATCH = 32


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
        """Megatron's path prefix of the training split: `.bin` and `.idx` follow."""
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

    Left out of the standard library: test suites, installed packages, the character tables of `encodings`, the
    generated `pydoc_data` and the build's own `_sysconfigdata`. In CPython 3.11.7 that leaves 606 files of 9.9 MB,
    30 of them (0.35 MB) held out; Debian's 3.11 without its optional packages has 8.7 MB, CPython 3.12 9.3 MB.
    The byte-level BPE is trained on the whole training split and never sees the held-out one. `corpus.json` is
    written last: a directory without it does not load.

    Args:
        directory: Created if missing; only files of the corpus are written there.
        vocab_size: Tokens including the three special ones; 259 to 65536.
        valid_fraction: Expected share of *files* to hold out, between 0 and 1; the share of bytes differs.
        progress: Called with one line before each step.
        files: Names relative to the standard library instead of all of it, of any size (for tests).

    Raises:
        ConfigurationError: A bad argument, too little text, or a finished corpus of another kind in `directory`.
    """
    say = progress or (lambda line: None)
    directory = Path(directory)
    _check_numbers(vocab_size, valid_fraction)
    texts = _read_sources(files)
    train = [text for name, text in texts.items() if not is_held_out(name, valid_fraction)]
    valid = [text for name, text in texts.items() if is_held_out(name, valid_fraction)]
    if not train or not valid:
        raise ConfigurationError(
            f"valid_fraction {valid_fraction} splits {len(texts)} files into {len(train)} for training and "
            f"{len(valid)} held out: expected at least one of each"
        )
    fingerprint = _fingerprint(texts, vocab_size, valid_fraction)
    if (finished := _read_manifest(directory)) is not None:
        if finished.fingerprint == fingerprint:
            say(f"{directory} already holds this corpus")
            return finished
        raise ConfigurationError(
            f"{directory} holds another corpus (vocab_size {finished.vocab_size}, valid_fraction "
            f"{finished.valid_fraction}, Python {finished.python}): expected a new or empty directory"
        )
    _make_directory(directory)
    say(f"training a tokenizer of {vocab_size} tokens on {_utf8_bytes(train) / 1e6:.1f} MB of text")
    tokenizer = _train_tokenizer(train, vocab_size)
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
    """Return the finished corpus in `directory`; a ConfigurationError says how to make a missing one."""
    corpus = _read_manifest(Path(directory))
    if corpus is None:
        raise ConfigurationError(
            f"no finished corpus in {directory}, make it with: skymoe corpus {directory}"
        )
    return corpus


def is_held_out(name: str, valid_fraction: float) -> bool:
    """Whether the file `name` (relative, with `/`) belongs to the held-out split: the same on every machine."""
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < valid_fraction * 2**64


def validation_batches(
    corpus: Corpus, seq_length: int, batch_size: int, count: int
) -> Iterator[dict[str, torch.Tensor | None]]:
    """Yield the first `count` batches of the held-out text, read as one stream in file order: no shuffling, no NeMo.

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


class HeldOutGPTDataset(GPTDataset):
    """Megatron's GPTDataset with validation and test splits of exactly one epoch.

    NeMo asks for as many validation samples as all validations of a run add up to, and beyond one epoch Megatron
    shuffles several epochs together: the validation set would depend on `max_steps`. Every validation starts again
    at the first sample, so with one epoch `limit_val_batches=N` is the same N batches in every run.
    """

    def __init__(
        self,
        indexed_dataset: IndexedDataset,
        dataset_path: str | None,
        indexed_indices: np.ndarray,
        num_samples: int | None,
        index_split: Split,
        config: Any,
    ) -> None:
        if index_split is not Split.train:
            num_samples = None
        super().__init__(indexed_dataset, dataset_path, indexed_indices, num_samples, index_split, config)


def corpus_data(
    corpus: str,
    seq_length: int = 256,
    global_batch_size: int = 8,
    micro_batch_size: int = 4,
    num_workers: int = 0,
    seed: int = 1,
    index_cache: Optional[str] = None,
) -> "PreTrainingDataModule":
    """NeMo's pre-training data module on the corpus in the directory `corpus`, for `run.Config(corpus_data, ...)`.

    Samples run across document ends: neither positions nor attention are reset there. NeMo itself adds the attention
    mask that its forward step demands where Transformer Engine is missing.

    Args:
        corpus: Directory that `skymoe corpus` wrote.
        seq_length: Tokens per sample.
        global_batch_size: Samples per optimizer step.
        micro_batch_size: Samples per forward pass of one data-parallel rank.
        num_workers: Loader processes per rank; 0 loads in the training process.
        seed: Of the order of the training samples.
        index_cache: Folder for Megatron's sample indices; default: `index` in the corpus directory.

    Raises:
        ConfigurationError: `corpus` is missing or unfinished.
    """
    found = load_corpus(Path(corpus).expanduser().resolve())
    from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer
    from nemo.collections.llm.gpt.data.pre_training import PreTrainingDataModule

    train, valid = str(found.train_prefix), str(found.valid_prefix)
    cache = Path(index_cache) if index_cache else found.directory / "index"
    return PreTrainingDataModule(
        paths={"train": [train], "validation": [valid], "test": [valid]},
        split=None,  # type: ignore[arg-type]  # NeMo warns about any other value beside a dictionary of paths
        seq_length=seq_length,
        tokenizer=AutoTokenizer(str(found.tokenizer)),
        global_batch_size=global_batch_size,
        micro_batch_size=micro_batch_size,
        num_workers=num_workers,
        seed=seed,
        persistent_workers=num_workers > 0,
        pin_memory=torch.cuda.is_available(),
        # Megatron names an index by its path, not by its content: a rebuilt corpus must not find the old one.
        index_mapping_dir=str(cache / found.fingerprint),
        dataset_cls=HeldOutGPTDataset,
    )


def _check_numbers(vocab_size: int, valid_fraction: float) -> None:
    smallest = len(SPECIAL_TOKENS) + 256
    if not smallest <= vocab_size <= 2**16:
        raise ConfigurationError(f"vocab_size is {vocab_size}: expected {smallest} to {2**16}")
    if not 0 < valid_fraction < 1:
        raise ConfigurationError(f"valid_fraction is {valid_fraction}: expected a number between 0 and 1")


def _make_directory(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(f"corpus directory {directory}: {error.strerror}") from error
    if not os.access(directory, os.W_OK):
        raise ConfigurationError(f"corpus directory {directory}: expected one that can be written")


def _read_sources(files: Sequence[str] | None) -> dict[str, str]:
    """Texts by relative name, sorted by name; a source that is empty or not UTF-8 is left out."""
    root = Path(sysconfig.get_path("stdlib"))
    texts = {}
    for name in sorted(_source_names(root) if files is None else files):
        try:
            text = (root / name).read_bytes().decode()
        except UnicodeDecodeError:
            continue
        if text:
            texts[name] = text
    if files is None and (found := _utf8_bytes(texts.values())) < MINIMUM_BYTES:
        raise ConfigurationError(
            f"Python's standard library at {root} has {found / 1e6:.1f} MB of source text: expected at least "
            f"{MINIMUM_BYTES / 1e6:.0f} MB (a stripped or zipped Python cannot make the corpus)"
        )
    return texts


def _source_names(root: Path) -> Iterator[str]:
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = set(subfolders) - LEFT_OUT_FOLDERS
        for name in files:
            relative = (Path(folder) / name).relative_to(root).as_posix()
            if name.endswith(".py") and not relative.startswith(LEFT_OUT_PREFIXES):
                yield relative


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
    _save_tokenizer(tokenizer, corpus.tokenizer)
    say(f"tokenizing {len(train)} files for training")
    train_tokens = _write_documents(tokenizer, train, corpus.train_prefix)
    say(f"tokenizing {len(valid)} held-out files")
    valid_tokens = _write_documents(tokenizer, valid, corpus.valid_prefix)
    corpus = replace(corpus, train_tokens=train_tokens, valid_tokens=valid_tokens)
    say(f"writing {MANIFEST}: {train_tokens + valid_tokens} tokens")
    partial = manifest.with_suffix(".partial")
    partial.write_text(json.dumps(asdict(corpus) | {"directory": "."}, indent=2) + "\n")
    os.replace(partial, manifest)
    return corpus


def _read_manifest(directory: Path) -> Corpus | None:
    """The corpus in `directory`, or None if its manifest or a file it counts is missing or of another size."""
    try:
        corpus = Corpus(**json.loads((directory / MANIFEST).read_text()) | {"directory": directory})
        splits = ((corpus.train_prefix, corpus.train_tokens), (corpus.valid_prefix, corpus.valid_tokens))
        for prefix, tokens in splits:
            if prefix.with_suffix(".bin").stat().st_size != tokens * np.dtype(np.uint16).itemsize:
                return None
            prefix.with_suffix(".idx").stat()
        (corpus.tokenizer / "tokenizer.json").stat()
    except (OSError, ValueError, TypeError):
        return None
    return corpus


def _train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token=SPECIAL_TOKENS[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ConfigurationError(
            f"vocab_size is {vocab_size}: expected at most {tokenizer.get_vocab_size()} for this amount of text"
        )
    return tokenizer


def _save_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    unknown, begin, end = SPECIAL_TOKENS
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=unknown,
        bos_token=begin,
        eos_token=end,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(directory)


def _write_documents(tokenizer: Tokenizer, texts: list[str], prefix: Path) -> int:
    """Write one document per text and return the number of tokens."""
    # A source that spells "</s>" in a string must not end its document there.
    tokenizer.encode_special_tokens = True
    builder = IndexedDatasetBuilder(str(prefix.with_suffix(".bin")), dtype=np.uint16)
    total = 0
    for start in range(0, len(texts), _FILES_PER_BATCH):
        for encoding in tokenizer.encode_batch_fast(texts[start : start + _FILES_PER_BATCH]):
            ids = torch.tensor([*encoding.ids, END_OF_DOCUMENT])
            builder.add_document(ids, [len(ids)])
            total += len(ids)
    builder.finalize(str(prefix.with_suffix(".idx")))
    return total
