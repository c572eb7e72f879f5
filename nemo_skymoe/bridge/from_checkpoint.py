"""Providers of models that exist: everything about the model comes from its folder."""

from pathlib import Path
from typing import Any

from nemo_skymoe.bridge.provider import SkyworkProvider, provider_of
from nemo_skymoe.checkpoint.description import Description
from nemo_skymoe.checkpoint.sources import Source, open_source
from nemo_skymoe.checkpoint.torch_dist.model_options import model_options
from nemo_skymoe.checkpoint.torch_dist.names import layout, padded_vocab_size


def provider_from(folder: Path | str, *, config: Path | None = None, **options: Any) -> SkyworkProvider:
    """Return the provider of a model from its checkpoint, of which headers and configuration alone are read.

    Sizes, vocabulary, rotary embedding, norm, tied embeddings and the gate are those of the checkpoint. To start from its
    weights, give a folder in Bridge's form to `checkpoint.pretrained_checkpoint` too.

    Args:
        folder: A checkpoint of Bridge, NeMo 2, Megatron-LM or Hugging Face, or the folder of a run of Bridge or NeMo.
        config: A config.json for a Megatron checkpoint that does not describe itself.
        options: Further fields of `SkyworkProvider`, which take precedence.

    Raises:
        ConfigurationError: The folder holds no checkpoint, or one of a model that has no place here.
    """
    source = open_source(Path(folder), config)
    return provider_of_description(source.description, padded_vocab_size=_rows(source), **options)


def provider_of_description(
    description: Description, *, padded_vocab_size: int, **options: Any
) -> SkyworkProvider:
    """Return the provider of a model from its description.

    Args:
        description: The model's description.
        padded_vocab_size: Rows of embedding and head. Bridge adds none to a number that is given.
        options: Further fields of `SkyworkProvider`, which take precedence.

    Raises:
        ConfigurationError: The model scales its rotary embedding in a way that is not carried over to Megatron.
    """
    known = model_options(description, padded_vocab_size)
    unpadded = description.architecture.vocab_size
    return provider_of(
        description.architecture,
        **{**known, "unpadded_vocab_size": unpadded, "should_pad_vocab": False, **options},
    )


def _rows(source: Source) -> int:
    """Return the rows that the checkpoint stores, or those with which a Hugging Face model is converted."""
    if source.form == "hf":
        return padded_vocab_size(source.description.architecture.vocab_size)
    return layout(source.weights.storage).padded_vocab_size
