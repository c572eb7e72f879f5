"""Embedding and head between Megatron, which has rows that no token refers to, and Hugging Face, which has none."""

from typing import Any

from megatron.bridge.models.conversion.param_mapping import AutoMapping
from torch import Tensor
from torch.nn.functional import pad


class VocabularyMapping(AutoMapping):
    """Bridge's mapping of a tensor of whichever parallelism, with rows of zeros added or left out at the end.

    Args:
        megatron_param: Megatron's name.
        hf_param: Hugging Face's name.
        vocab_size: Tokens of the vocabulary; None leaves every row in.
    """

    def __init__(self, megatron_param: str, hf_param: str, vocab_size: int | None) -> None:
        super().__init__(megatron_param, hf_param)
        self._vocab_size = vocab_size

    def hf_to_megatron(self, hf_weights: Tensor, megatron_module: Any) -> Tensor:
        """Return this rank's rows of weights [tokens, hidden]."""
        missing = megatron_module.weight.shape[0] * self.tp_size - hf_weights.shape[0]
        padded = pad(hf_weights, (0, 0, 0, missing)) if missing > 0 else hf_weights
        return super().hf_to_megatron(padded, megatron_module)

    def megatron_to_hf(self, megatron_weights: Tensor | None, megatron_module: Any) -> dict[str, Tensor]:
        """Return the rows of all ranks that belong to tokens, by Hugging Face's name."""
        found = super().megatron_to_hf(megatron_weights, megatron_module)
        return {name: tensor[: self._vocab_size] for name, tensor in found.items()}
