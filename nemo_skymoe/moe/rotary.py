"""Llama 3.1's rotary embedding in Megatron's model, with every number of it."""

from typing import Any

from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

from nemo_skymoe.rotary_options import RotaryOptions


def scale_rotary_embedding(model: Any, options: RotaryOptions) -> None:
    """Scale the frequencies of a model as its options say. This may be done again, with the same result.

    `GPTModel` passes the factor on to its rotary embedding and none of the other three numbers, and NeMo passes not even
    that. The scaling itself is Megatron's.

    Args:
        model: Megatron's `GPTModel`, of any pipeline stage, before its first forward pass.
        options: The values, unchanged if `rope_scaling` is False.
    """
    if not options.rope_scaling:
        return
    embedding: Any = model.rotary_pos_emb
    plain = RotaryEmbedding(
        kv_channels=model.config.kv_channels,
        rotary_percent=model.rotary_percent,
        rotary_base=model.rotary_base,
        use_cpu_initialization=embedding.inv_freq.device.type == "cpu",
        cp_group=embedding.cp_group,
    )
    embedding.inv_freq = embedding._apply_scaling(
        plain.inv_freq,
        factor=options.rope_scaling_factor,
        low_freq_factor=options.rope_scaling_low_freq_factor,
        high_freq_factor=options.rope_scaling_high_freq_factor,
        original_max_position_embeddings=options.rope_scaling_original_max_position_embeddings,
    )
