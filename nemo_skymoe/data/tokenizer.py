"""Tokenizers from local files: Hugging Face's `tokenizer.json` and SentencePiece's `tokenizer.model`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from nemo_skymoe.checkpoint.tokenizer import SENTENCEPIECE, TOKENIZER_JSON
from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.durable.errors import CheckpointError

MODEL_INPUTS = ["input_ids", "attention_mask"]
"""The inputs that a tokenizer makes for a model. By default it makes types of tokens too, which no model here takes."""
CONFIG = "tokenizer_config.json"
_ENDS = ("</s>", "<|endoftext|>", "<|end_of_text|>")


class TextTokenizer(Protocol):
    """The attributes and methods that writing documents needs."""

    size: int
    """One more than the largest id."""
    end_of_document: int
    end_token: str
    """Name of the token that ends documents."""

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text. Special tokens that it spells are text."""
        ...


class HuggingFaceTokenizer:
    """A `tokenizers.Tokenizer`; its settings for truncation, padding and special tokens are switched off."""

    def __init__(self, tokenizer: Any, end_of_document: int):
        tokenizer.no_truncation()
        tokenizer.no_padding()
        # A source that spells "</s>" in a string must not end its document there.
        tokenizer.encode_special_tokens = True
        self._tokenizer, self.end_of_document = tokenizer, end_of_document
        self.end_token = tokenizer.id_to_token(end_of_document)
        self.size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text."""
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encoded]


class SentencePieceTokenizer:
    """A `sentencepiece.SentencePieceProcessor`."""

    def __init__(self, processor: Any, end_of_document: int):
        self._processor, self.end_of_document = processor, end_of_document
        self.end_token = processor.id_to_piece(end_of_document)
        self.size = processor.get_piece_size()

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text."""
        return self._processor.encode(list(texts), num_threads=1)


def tokenizer_file(path: Path) -> Path:
    """Return the file that `path` names, or that lies in it.

    Raises:
        ConfigurationError: There is none.
    """
    candidates = [path / TOKENIZER_JSON, path / SENTENCEPIECE] if path.is_dir() else [path]
    for file in candidates:
        if file.is_file() and file.suffix in (".json", ".model"):
            return file
    raise ConfigurationError(
        f"the tokenizer '{path}' is not there, expected {TOKENIZER_JSON}, {SENTENCEPIECE}, or a folder with one of them;"
        " `skymoe corpus` and `skymoe preprocess` put one beside their text"
    )


def load(path: Path, end_of_document: str | None = None) -> TextTokenizer:
    """Load the tokenizer of a folder or file.

    Args:
        path: A folder, a `*.json` of Hugging Face's form, or a SentencePiece `*.model`.
        end_of_document: The token that ends documents. None takes the tokenizer's own end of sequence.

    Raises:
        ConfigurationError: There is no such file, or it does not have that token.
        CheckpointError: The file is damaged.
    """
    file = tokenizer_file(path)
    try:
        return (_hugging_face if file.suffix == ".json" else _sentencepiece)(file, end_of_document)
    except ConfigurationError:
        raise
    except Exception as reason:  # both libraries raise what they like
        raise CheckpointError(f"the tokenizer '{file}' cannot be loaded: {reason}; copy it anew") from None


def _hugging_face(file: Path, end_of_document: str | None) -> TextTokenizer:
    from tokenizers import Tokenizer

    tokenizer: Any = Tokenizer.from_file(str(file))
    wanted = [end_of_document] if end_of_document else [*_configured_end(file.parent), *_ENDS]
    for token in wanted:
        if (number := tokenizer.token_to_id(token)) is not None:
            return HuggingFaceTokenizer(tokenizer, number)
    raise _no_end(file, wanted)


def _sentencepiece(file: Path, end_of_document: str | None) -> TextTokenizer:
    from sentencepiece import SentencePieceProcessor

    processor: Any = SentencePieceProcessor(model_file=str(file))
    number = processor.piece_to_id(end_of_document) if end_of_document else processor.eos_id()
    if number < 0 or (end_of_document and number == processor.unk_id()):
        raise _no_end(file, [end_of_document or "eos_id"])
    return SentencePieceTokenizer(processor, number)


def _configured_end(folder: Path) -> list[str]:
    config = folder / CONFIG
    token = json.loads(config.read_text()).get("eos_token") if config.is_file() else None
    token = token.get("content") if isinstance(token, dict) else token
    return [token] if token else []


def _no_end(file: Path, tokens: Sequence[str]) -> ConfigurationError:
    return ConfigurationError(
        f"the tokenizer '{file}' has no {' or '.join(map(repr, tokens))} to end documents with, expected"
        " --end-of-document with a token of its own"
    )
