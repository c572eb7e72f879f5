"""Llama 3.1's and YaRN's rotary embedding in Megatron's model, with every number of it."""

import inspect
from typing import Any

import torch
from megatron.core.models.common.embeddings import yarn_rotary_pos_embedding as yarn
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer import attention
from torch import Tensor

from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.rotary_options import RotaryOptions, concentration_factor


def scale_rotary_embedding(model: Any, options: RotaryOptions) -> None:
    """Scale the frequencies of a model as its options say. This may be done again, with the same result.

    `GPTModel` passes Llama 3.1's factor on to its rotary embedding and none of the other three numbers, and NeMo passes
    not even that. The scaling itself is Megatron's. YaRN's concentration factor is applied by Megatron's attention, which
    takes it from the configuration.

    Args:
        model: Megatron's `GPTModel`, of any pipeline stage, before its first forward pass.
        options: The values, which are those of the model's own configuration. Without effect if they scale nothing.

    Raises:
        ConfigurationError: The installed Megatron-Core cannot compute it.
    """
    factor = options.yarn_rotary_scaling_factor
    if not options.rope_scaling and factor == 1:
        return
    embedding: Any = model.rotary_pos_emb
    plain = RotaryEmbedding(
        kv_channels=model.config.kv_channels,
        rotary_percent=model.rotary_percent,
        rotary_base=model.rotary_base,
        use_cpu_initialization=embedding.inv_freq.device.type == "cpu",
        cp_group=embedding.cp_group,
    ).inv_freq
    if factor != 1:
        embedding.inv_freq = _interpolated(plain, model.rotary_base, options)
        return
    embedding.inv_freq = embedding._apply_scaling(
        plain,
        factor=options.rope_scaling_factor,
        low_freq_factor=options.rope_scaling_low_freq_factor,
        high_freq_factor=options.rope_scaling_high_freq_factor,
        original_max_position_embeddings=options.rope_scaling_original_max_position_embeddings,
    )


def _interpolated(plain: Tensor, base: float, options: RotaryOptions) -> Tensor:
    """Return YaRN's frequencies [head / 2]: high ones as they are, low ones divided by the factor."""
    _check_megatron(options)
    find_range, ramp = yarn._yarn_find_correction_range, yarn._yarn_linear_ramp_mask
    rounding = (options.yarn_correction_range_round_to_int,) if _takes(find_range, "round_to_int") else ()
    low, high = find_range(
        options.yarn_beta_fast,
        options.yarn_beta_slow,
        2 * len(plain),
        base,  # type: ignore[arg-type]
        options.yarn_original_max_position_embeddings,
        *rounding,
    )
    device = (plain.device,) if _takes(ramp, "device") else ()
    kept = 1.0 - ramp(low, high, len(plain), *device).to(plain.device)
    exponents = torch.arange(0, 2 * len(plain), 2, dtype=torch.float32, device=plain.device) / (
        2 * len(plain)
    )
    divided = 1.0 / (options.yarn_rotary_scaling_factor * base**exponents)
    return divided * (1 - kept) + plain * kept


def _check_megatron(options: RotaryOptions) -> None:
    """Refuse what the installed Megatron-Core has no code for: 0.14 has YaRN for latent attention alone."""
    factor = concentration_factor(
        options.yarn_rotary_scaling_factor, options.yarn_mscale, options.yarn_mscale_all_dim
    )
    if factor != 1 and not hasattr(attention, "_yarn_get_concentration_factor_from_config"):
        raise ConfigurationError(
            f"yarn_mscale is {options.yarn_mscale:g}, with which YaRN multiplies sine and cosine by {factor:.6g}; the"
            " attention of this Megatron-Core does not: expected Megatron-Core 0.15 or later, or yarn_mscale=0"
        )
    rounded = options.yarn_correction_range_round_to_int
    if not rounded and not _takes(yarn._yarn_find_correction_range, "round_to_int"):
        raise ConfigurationError(
            "yarn_correction_range_round_to_int is False, expected True with this Megatron-Core, which always rounds"
        )


def _takes(function: Any, argument: str) -> bool:
    return argument in inspect.signature(function).parameters
