"""The place of the tokenizer in a checkpoint that was converted for Bridge, wherever the checkpoint lies."""

from pathlib import Path


def beside_the_weights() -> Path:
    """Return the value of `tokenizer_model` for which Bridge's `load_tokenizer` takes `tokenizer/` beside the weights."""
    return Path()
