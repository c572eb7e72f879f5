"""The options of a scaled rotary embedding, which Megatron's configuration classes have in part or not at all."""

import math
from dataclasses import dataclass
from typing import Any

from nemo_skymoe import option_values
from nemo_skymoe.durable.errors import ConfigurationError


@dataclass
class RotaryOptions:
    """Llama 3.1's scaling of the rotary frequencies, mixed in *before* Megatron's or NeMo's configuration class.

    Megatron's `GPTModel` takes the first two of these alone, and has the default values of the others fixed.
    `moe.rotary.scale_rotary_embedding` gives a model all of them.

    Raises:
        ConfigurationError: A value cannot work. The message names the option and what was expected.
    """

    rope_scaling: bool = False
    """Whether the frequencies are scaled as in Llama 3.1 to 3.3 (Hugging Face's `rope_type` "llama3")."""
    rope_scaling_factor: float = 8.0
    """The number by which low frequencies are divided."""
    rope_scaling_low_freq_factor: float = 1.0
    """A frequency is low if its wave is longer than the original length divided by this."""
    rope_scaling_high_freq_factor: float = 4.0
    """A frequency is high, and stays as it is, if its wave is shorter than the original length divided by this."""
    rope_scaling_original_max_position_embeddings: int = 8192
    """The original length, in tokens, that the model was trained with before its context was extended."""

    def __post_init__(self) -> None:
        self.check_rotary()
        parent: Any = super()
        if hasattr(parent, "__post_init__"):
            parent.__post_init__()

    def check_rotary(self) -> None:
        """Refuse values that scale nothing, or divide by zero. `__post_init__` calls this.

        Raises:
            ConfigurationError: A value cannot work.
        """
        if wrong := option_values.wrong_type(self, RotaryOptions):
            raise ConfigurationError(wrong)
        for name in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"):
            value = getattr(self, f"rope_scaling_{name}")
            if not 0 < value < math.inf:
                raise ConfigurationError(f"rope_scaling_{name} is {value}, expected a positive number")
        low, high = self.rope_scaling_low_freq_factor, self.rope_scaling_high_freq_factor
        if low >= high:
            raise ConfigurationError(
                f"rope_scaling_low_freq_factor is {low:g}, expected less than rope_scaling_high_freq_factor ({high:g})"
            )
