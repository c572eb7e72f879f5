"""Llama 3.1's scaling of the rotary embedding in Megatron's model, against transformers' own."""

from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.moe.rotary import scale_rotary_embedding
from nemo_skymoe.rotary_options import RotaryOptions

THETA, HEAD = 5e5, 64


def model(options: RotaryOptions) -> Any:
    """What of GPTModel matters here, made as GPTModel makes it: it passes the factor on, and no more."""
    embedding = RotaryEmbedding(
        HEAD,
        1.0,
        rotary_base=int(THETA),
        rope_scaling=options.rope_scaling,
        rope_scaling_factor=options.rope_scaling_factor,
        use_cpu_initialization=True,
    )
    config = SimpleNamespace(kv_channels=HEAD)
    return SimpleNamespace(
        config=config, rotary_pos_emb=embedding, rotary_percent=1.0, rotary_base=int(THETA)
    )


def test_the_frequencies_are_those_of_transformers():
    for options in (
        RotaryOptions(rope_scaling=True),
        RotaryOptions(True, 32.0),
        RotaryOptions(True, 4.0, 0.5, 2.5, 1024),
    ):
        scaling = {
            name.removeprefix("rope_scaling_"): value
            for name, value in asdict(options).items()
            if name != "rope_scaling"
        }
        config = LlamaConfig(
            hidden_size=HEAD,
            num_attention_heads=1,
            rope_theta=THETA,
            rope_scaling={"rope_type": "llama3", **scaling},
        )
        expected, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        scaled = model(options)
        for _ in range(2):  # the second time changes nothing
            scale_rotary_embedding(scaled, options)
            assert torch.equal(scaled.rotary_pos_emb.inv_freq, expected), options


def test_without_scaling_the_embedding_is_left_alone():
    plain = model(RotaryOptions())
    before = plain.rotary_pos_emb.inv_freq
    scale_rotary_embedding(plain, RotaryOptions(rope_scaling_factor=4.0))
    assert plain.rotary_pos_emb.inv_freq is before


def test_values_that_cannot_work_are_refused_by_name():
    for name, value, expected in (
        ("rope_scaling", 1, "True or False"),
        ("rope_scaling_factor", 0.0, "a positive number"),
        ("rope_scaling_factor", "8", "a number"),
        ("rope_scaling_original_max_position_embeddings", -1, "a positive number"),
        ("rope_scaling_low_freq_factor", 4.0, r"less than rope_scaling_high_freq_factor \(4\)"),
    ):
        with pytest.raises(ConfigurationError, match=f"^{name} is .*, expected {expected}"):
            RotaryOptions(**{name: value})
