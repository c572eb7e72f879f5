"""Parameter counts against published figures, and what is refused."""

import pytest

from nemo_skymoe.architecture import SKYWORK_13B, SKYWORK_MOE_146B, Architecture
from nemo_skymoe.config import ConfigurationError
from tests.cases import every


def test_skywork_13b():
    assert SKYWORK_13B.parameters == SKYWORK_13B.activated_parameters == 13_854_113_280


def test_skywork_moe():
    assert SKYWORK_MOE_146B.parameters == 146_356_167_168
    assert round(SKYWORK_MOE_146B.activated_parameters / 1e9, 2) == 22.69


def test_llama_3_8b_has_grouped_queries():
    llama = Architecture(32, 4096, 14336, 32, vocab_size=128256, num_query_groups=8)
    assert llama.parameters == 8_030_261_248


def test_qwen_has_biases_or_norms_of_heads():
    qwen2_7b = Architecture(28, 3584, 18944, 28, vocab_size=152064, num_query_groups=4, add_qkv_bias=True)
    assert qwen2_7b.parameters == 7_615_616_512
    qwen3_8b = Architecture(
        36, 4096, 12288, 32, vocab_size=151936, num_query_groups=8, kv_channels=128, qk_layernorm=True
    )
    assert qwen3_8b.parameters == 8_190_735_360


def test_tied_embeddings_count_once():
    tied = Architecture(2, 8, 16, 2, vocab_size=10, tied_embeddings=True)
    untied = Architecture(2, 8, 16, 2, vocab_size=10)
    assert untied.parameters - tied.parameters == 80


@every(
    ("change", "named"),
    [
        ({"num_layers": 0}, "num_layers"),
        ({"hidden_size": 7}, "hidden_size"),
        ({"num_query_groups": 3}, "num_query_groups"),
        ({"num_moe_experts": 4, "moe_router_topk": 5}, "moe_router_topk"),
    ],
)
def test_impossible_sizes_are_named(change: dict[str, int], named: str):
    sizes = dict(num_layers=2, hidden_size=8, ffn_hidden_size=16, num_attention_heads=2, vocab_size=10)
    with pytest.raises(ConfigurationError, match=named):
        Architecture(**{**sizes, **change})
