"""The options of a scaled rotary embedding, which Megatron's configuration classes have in part or not at all."""

import logging
import math
from dataclasses import dataclass
from typing import Any

from nemo_skymoe import option_values
from nemo_skymoe.durable.errors import ConfigurationError

_WITHOUT_CONCENTRATION = ("apply_rope_fusion", "fused_single_qkv_rope", "flash_decode")
"""Options of Megatron whose kernels rotate without YaRN's concentration factor."""
logger = logging.getLogger(__name__)


@dataclass
class RotaryOptions:
    """The scaling of the rotary frequencies, Llama 3.1's or YaRN's, mixed in *before* Megatron's or NeMo's class.

    Megatron's `GPTModel` takes the first two of these alone, and has the default values of the other `rope_scaling_*`
    fixed. Its own YaRN is another embedding, which does not know context parallelism in every version.
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

    yarn_rotary_scaling_factor: float = 1.0
    """The factor by which YaRN (arXiv 2309.00071, Hugging Face's `rope_type` "yarn") extends the context. 1 is no YaRN,
    and leaves the six options below without effect."""
    yarn_original_max_position_embeddings: int = 4096
    """The original length, in tokens, that the model was trained with before its context was extended."""
    yarn_beta_fast: float = 32.0
    """A frequency that turns more often than this in the original length stays as it is."""
    yarn_beta_slow: float = 1.0
    """A frequency that turns less often than this in the original length is divided by the factor."""
    yarn_mscale: float = 1.0
    """Sine and cosine are multiplied by `concentration_factor`, of which this is the numerator's weight."""
    yarn_mscale_all_dim: float = 0.0
    """The weight in the denominator of the same."""
    yarn_correction_range_round_to_int: bool = True
    """Whether the numbers of the two limiting frequencies are rounded (Hugging Face's `truncate`)."""

    def __post_init__(self) -> None:
        self.check_rotary()
        parent: Any = super()
        if hasattr(parent, "__post_init__"):
            parent.__post_init__()

    def check_rotary(self) -> None:
        """Refuse values that scale nothing, or divide by zero, and turn off what YaRN does not go with.

        `__post_init__` calls this.

        Raises:
            ConfigurationError: A value cannot work.
        """
        if wrong := option_values.wrong_type(self, RotaryOptions):
            raise ConfigurationError(wrong)
        for name in (
            *(f"rope_scaling_{name}" for name in ("factor", "low_freq_factor", "high_freq_factor")),
            *("rope_scaling_original_max_position_embeddings", "yarn_original_max_position_embeddings"),
            *("yarn_beta_fast", "yarn_beta_slow"),
        ):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ConfigurationError(f"{name} is {value}, expected a positive number")
        for less, more in (
            ("rope_scaling_low_freq_factor", "rope_scaling_high_freq_factor"),
            ("yarn_beta_slow", "yarn_beta_fast"),
        ):
            if getattr(self, less) >= getattr(self, more):
                raise ConfigurationError(
                    f"{less} is {getattr(self, less):g}, expected less than {more} ({getattr(self, more):g})"
                )
        self._check_yarn()

    def _check_yarn(self) -> None:
        if getattr(self, "position_embedding_type", "rope") == "yarn":
            raise ConfigurationError(
                "position_embedding_type is 'yarn', expected 'rope', with which yarn_rotary_scaling_factor scales too:"
                " Megatron's own embedding does not know context parallelism in every version"
            )
        if not 1 <= self.yarn_rotary_scaling_factor < math.inf:
            raise ConfigurationError(
                f"yarn_rotary_scaling_factor is {self.yarn_rotary_scaling_factor}, expected at least 1"
            )
        for name in ("yarn_mscale", "yarn_mscale_all_dim"):
            if not math.isfinite(getattr(self, name)):
                raise ConfigurationError(f"{name} is {getattr(self, name)}, expected a finite number")
        if self.yarn_rotary_scaling_factor == 1:
            return
        for name, *off in (("rope_scaling", False), ("seq_len_interpolation_factor", None, 1)):
            if (value := getattr(self, name, off[0])) not in off:
                raise ConfigurationError(
                    f"{name} is {value}, expected {off[0]} with yarn_rotary_scaling_factor ="
                    f" {self.yarn_rotary_scaling_factor:g}: frequencies are scaled once"
                )
        factor = concentration_factor(
            self.yarn_rotary_scaling_factor, self.yarn_mscale, self.yarn_mscale_all_dim
        )
        if not factor > 0:
            raise ConfigurationError(
                f"yarn_mscale is {self.yarn_mscale:g} and yarn_mscale_all_dim {self.yarn_mscale_all_dim:g}, expected"
                f" numbers with which sine and cosine are multiplied by a positive one, not by {factor:g}"
            )
        if factor != 1:
            self._turn_off_what_ignores(factor)

    def _turn_off_what_ignores(self, factor: float) -> None:
        for name in _WITHOUT_CONCENTRATION:
            if getattr(self, name, False):
                logger.warning(
                    "%s is turned off: its kernel does not multiply by %.6g, as yarn_mscale demands",
                    name,
                    factor,
                )
                setattr(self, name, False)


def concentration_factor(factor: float, mscale: float, mscale_all_dim: float) -> float:
    """Return the number that sine and cosine are multiplied by, as Megatron computes it from the options of YaRN."""
    numerator, denominator = (
        0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0 for weight in (mscale, mscale_all_dim)
    )
    return numerator / denominator if denominator else math.inf
