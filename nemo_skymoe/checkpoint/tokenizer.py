"""The tokenizer that travels with a checkpoint: how many ids it has and which ones are special."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemo_skymoe.checkpoint.config_values import read_json
from nemo_skymoe.durable.errors import CheckpointError

TOKENIZER_JSON, SENTENCEPIECE, VOCABULARY = "tokenizer.json", "tokenizer.model", "vocab.json"
SPECIAL = ("bos_token", "eos_token", "pad_token")


def size(folder: Path) -> int | None:
    """Return one more than the largest id; None where neither `tokenizer.json` nor `tokenizer.model` tells it.

    Raises:
        CheckpointError: The file is damaged.
    """
    return max(_ids(folder).values(), default=-1) + 1 or None


def special_ids(folder: Path) -> dict[str, int]:
    """`bos_token_id`, `eos_token_id` and `pad_token_id`, as far as `tokenizer_config.json` names the tokens.

    Raises:
        CheckpointError: A file is damaged.
    """
    file = folder / "tokenizer_config.json"
    if not file.is_file():
        return {}
    config, ids = read_json(file), _ids(folder)
    tokens = {name: config.get(name) for name in SPECIAL}
    texts = {
        name: token.get("content") if isinstance(token, dict) else token for name, token in tokens.items()
    }
    return {f"{name}_id": ids[text] for name, text in texts.items() if isinstance(text, str) and text in ids}


def _ids(folder: Path) -> dict[str, int]:
    if (file := folder / TOKENIZER_JSON).is_file():
        return _ids_of_json(file)
    added = folder / "added_tokens.json"
    more = read_json(added) if added.is_file() else {}
    if (file := folder / VOCABULARY).is_file():
        return _integers(read_json(file), file) | _integers(more, added)
    if not (file := folder / SENTENCEPIECE).is_file():
        return {}
    from sentencepiece import SentencePieceProcessor

    try:
        model: Any = SentencePieceProcessor(model_file=str(file))
    except (RuntimeError, OSError) as reason:
        raise CheckpointError(f"'{file}' is no SentencePiece model: {reason}") from reason
    ids = {model.id_to_piece(number): number for number in range(model.vocab_size())}
    return ids | _integers(more, added)


def _ids_of_json(file: Path) -> dict[str, int]:
    values = read_json(file)
    try:
        vocabulary = values["model"]["vocab"]
        if isinstance(vocabulary, list):  # Unigram: [piece, score] in the order of the ids
            vocabulary = {piece: number for number, (piece, _) in enumerate(vocabulary)}
        ids = vocabulary | {token["content"]: token["id"] for token in values["added_tokens"]}
    except (KeyError, TypeError, ValueError) as reason:
        raise CheckpointError(f"'{file}' is no tokenizer of Hugging Face's: {reason!r}") from reason
    return _integers(ids, file)


def _integers(ids: dict[str, Any], file: Path) -> dict[str, int]:
    if not all(isinstance(number, int) for number in ids.values()):
        raise CheckpointError(f"'{file}' is no tokenizer of Hugging Face's: an id is no integer")
    return ids
