"""A byte-level BPE tokenizer that is trained on text, in Hugging Face's form."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.data.tokenizer import MODEL_INPUTS

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")
"""Special tokens with the ids 0, 1 and 2, as in the tokenizer of the released Skywork models."""
END_OF_DOCUMENT = SPECIAL_TOKENS.index("</s>")
SMALLEST = len(SPECIAL_TOKENS) + 256
"""Number of tokens in the smallest vocabulary that spells everything."""


def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train on `texts`, to exactly `vocab_size` tokens.

    Raises:
        ConfigurationError: There is not enough text for so many tokens.
    """
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


def save(tokenizer: Tokenizer, directory: Path) -> None:
    """Write the folder that `AutoTokenizer.from_pretrained` loads."""
    from transformers import PreTrainedTokenizerFast

    unknown, begin, end = SPECIAL_TOKENS
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=unknown,
        bos_token=begin,
        eos_token=end,
        clean_up_tokenization_spaces=False,
        model_input_names=MODEL_INPUTS,
    ).save_pretrained(directory)
