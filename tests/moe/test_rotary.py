"""Llama 3.1's and YaRN's scaling of the rotary embedding in Megatron's model, against transformers' own."""

import logging
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.models.common.embeddings import yarn_rotary_pos_embedding
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer import attention
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from nemo_skymoe.checkpoint import rope
from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.moe.rotary import scale_rotary_embedding
from nemo_skymoe.rotary_options import RotaryOptions, concentration_factor

THETA, HEAD = 5e5, 64
MULTIPLIES = hasattr(attention, "_yarn_get_concentration_factor_from_config")
"""Whether the installed Megatron-Core's attention has YaRN's concentration factor, as 0.14's has not."""
YARNS: tuple[dict[str, Any], ...] = (
    {"factor": 4.0},
    {"factor": 4.0, "original_max_position_embeddings": 1024},
    {"factor": 40.0, "original_max_position_embeddings": 4096, "mscale": 0.707, "mscale_all_dim": 0.4},
    {"factor": 2.5, "mscale": 0.5},
    {"factor": 4.0, "mscale": 1.0, "mscale_all_dim": 1.0},
    {"factor": 8, "beta_fast": 24, "beta_slow": 2.5, "truncate": False},
    {"factor": 4.0, "attention_factor": 0.8782488562869419},
    {"factor": 16.0, "attention_factor": 1.0},
    {"factor": 3.0, "attention_factor": 2.7182818284590455, "mscale": 0.3, "mscale_all_dim": 0.2},
)
"""What configurations of models have, and each of the optional fields."""


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
            if name.startswith("rope_scaling_")
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


def by_transformers(scaling: dict[str, Any]) -> tuple[torch.Tensor, float]:
    config = LlamaConfig(
        hidden_size=HEAD,
        num_attention_heads=1,
        max_position_embeddings=2048,
        rope_theta=THETA,
        rope_scaling={"rope_type": "yarn", **scaling},
    )
    return ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))


def of_yarn(scaling: dict[str, Any]) -> RotaryOptions:
    read = rope.canonical({"rope_type": "yarn", **scaling}, 2048)
    options = rope.megatron_options(read)
    assert rope.scaling_of(options) == read
    return RotaryOptions(**{name: value for name, value in options.items() if name.startswith("yarn_")})


@pytest.mark.skipif(not MULTIPLIES, reason="Megatron-Core 0.14 has no concentration factor")
def test_yarn_is_that_of_transformers():
    """Every bit of the frequencies, and the number that sine and cosine are multiplied by."""
    plain = model(RotaryOptions()).rotary_pos_emb.inv_freq
    for scaling in YARNS:
        expected, factor = by_transformers(scaling)
        options = of_yarn(scaling)
        scaled = model(options)
        for _ in range(2):
            scale_rotary_embedding(scaled, options)
            assert torch.equal(scaled.rotary_pos_emb.inv_freq, expected), scaling
        assert not torch.equal(expected, plain) and torch.equal(expected[:1], plain[:1])
        theirs = yarn_rotary_pos_embedding._yarn_get_concentration_factor_from_config(options)  # type: ignore[arg-type]
        assert theirs == factor, scaling


def test_the_concentration_factor_is_megatrons():
    if not MULTIPLIES:
        pytest.skip("Megatron-Core 0.14 has none")
    for values in ((1.0, 1.0, 0.0), (4.0, 1.0, 0.0), (40.0, 0.707, 1.3), (4.0, -0.5, 0.0), (8.0, 0.0, 1.0)):
        theirs = yarn_rotary_pos_embedding._yarn_get_concentration_factor(*values)
        assert concentration_factor(*values) == theirs, values


def test_what_the_installed_megatron_lacks_is_refused_by_name():
    for lacking, scaling, message in (
        (
            not MULTIPLIES,
            {"factor": 4.0},
            r"yarn_mscale is 1, .*multiplies .* by 1\.13863; .*or yarn_mscale=0",
        ),
        (
            not MULTIPLIES,
            {"factor": 4.0, "attention_factor": 1.0, "truncate": False},
            "yarn_correction_range_round_to_int is False, expected True with this Megatron-Core",
        ),
    ):
        options = of_yarn(scaling)
        if lacking:
            with pytest.raises(ConfigurationError, match=f"^{message}"):
                scale_rotary_embedding(model(options), options)
        else:
            scale_rotary_embedding(model(options), options)


def test_yarn_that_nothing_multiplies_is_computed_by_every_megatron():
    scaling = {"factor": 4.0, "attention_factor": 1.0}
    options = of_yarn(scaling)
    scaled = model(options)
    scale_rotary_embedding(scaled, options)
    assert torch.equal(scaled.rotary_pos_emb.inv_freq, by_transformers(scaling)[0])


def test_without_scaling_the_embedding_is_left_alone():
    plain = model(RotaryOptions())
    before = plain.rotary_pos_emb.inv_freq
    for without in (
        RotaryOptions(rope_scaling_factor=4.0),
        RotaryOptions(yarn_mscale=3.0, yarn_beta_fast=9.0),
    ):
        scale_rotary_embedding(plain, without)
        assert plain.rotary_pos_emb.inv_freq is before


def test_kernels_without_the_concentration_factor_are_turned_off_by_name(caplog: pytest.LogCaptureFixture):
    @dataclass
    class Fused(RotaryOptions):
        apply_rope_fusion: bool = True
        fused_single_qkv_rope: bool = False

    with caplog.at_level(logging.WARNING):
        assert (
            Fused(yarn_rotary_scaling_factor=4.0, yarn_mscale=0.0).apply_rope_fusion
            and Fused().apply_rope_fusion
        )
        assert not caplog.messages
        assert not Fused(yarn_rotary_scaling_factor=4.0).apply_rope_fusion
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith(
        "apply_rope_fusion is turned off: its kernel does not multiply by 1.13863"
    )


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


def test_values_of_yarn_that_cannot_work_are_refused_by_name():
    @dataclass
    class Config(RotaryOptions):
        position_embedding_type: str = "rope"
        seq_len_interpolation_factor: float | None = None

    four = {"yarn_rotary_scaling_factor": 4.0}
    for options, message in (
        ({"yarn_rotary_scaling_factor": 0.5}, "yarn_rotary_scaling_factor is 0.5, expected at least 1"),
        ({"yarn_rotary_scaling_factor": None}, "yarn_rotary_scaling_factor is None, expected a number"),
        ({"yarn_beta_slow": 32.0}, r"yarn_beta_slow is 32, expected less than yarn_beta_fast \(32\)"),
        (
            {"yarn_original_max_position_embeddings": 0},
            "yarn_original_max_position_embeddings is 0, expected a pos",
        ),
        ({"yarn_mscale": float("inf")}, "yarn_mscale is inf, expected a finite number"),
        (four | {"yarn_mscale": -8.0}, "yarn_mscale is -8 and yarn_mscale_all_dim 0, expected numbers"),
        (
            four | {"rope_scaling": True},
            "rope_scaling is True, expected False with yarn_rotary_scaling_factor = 4",
        ),
        (
            four | {"seq_len_interpolation_factor": 2.0},
            "seq_len_interpolation_factor is 2.0, expected None with",
        ),
        (
            {"position_embedding_type": "yarn"},
            "position_embedding_type is 'yarn', expected 'rope', with which",
        ),
    ):
        with pytest.raises(ConfigurationError, match=f"^{message}"):
            Config(**options)
