"""The sizes that tensor parallelism divides, with the installed Megatron as the judge."""

import itertools
from typing import Any

import pytest
from megatron.core.transformer.transformer_config import TransformerConfig

from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.pipeline.division import check_division
from tests.moe.worlds import spreads_key_value_heads


def by_megatron(**sizes: Any) -> bool:
    try:
        TransformerConfig(num_layers=2, hidden_size=48, **sizes)
    except ValueError:
        return False
    return True


def by_us(**sizes: int) -> bool:
    config: Any = TransformerConfig(num_layers=2, hidden_size=48, num_attention_heads=12)
    for name, size in sizes.items():
        setattr(config, name, size)
    try:
        check_division(config)
    except ConfigurationError:
        return False
    return True


def test_nothing_is_refused_that_megatron_computes():
    """Megatron's configuration is asked first, and refuses in its own words what an older version cannot do."""
    accepted, refused = [], []
    for heads, groups, ranks in itertools.product((6, 12), (1, 2, 3, 6), (1, 2, 3, 4, 12)):
        sizes = {
            "num_attention_heads": heads,
            "num_query_groups": groups,
            "tensor_model_parallel_size": ranks,
            "ffn_hidden_size": 96,
        }
        (accepted if by_us(**sizes) else refused).append(sizes)
    assert [sizes for sizes in refused if by_megatron(**sizes)] == []
    if spreads_key_value_heads():
        assert [sizes for sizes in accepted if not by_megatron(**sizes)] == []
    assert len(accepted) > 20 and len(refused) > 5


def test_what_does_not_divide_is_refused_by_its_option():
    config: Any = TransformerConfig(num_layers=2, hidden_size=48, num_attention_heads=12, num_query_groups=3)
    config.tensor_model_parallel_size = 2
    message = "num_query_groups is 3, expected a multiple or a divisor of tensor_model_parallel_size = 2"
    with pytest.raises(ConfigurationError, match=message):
        check_division(config)
    config.tensor_model_parallel_size = 5
    with pytest.raises(ConfigurationError, match="num_attention_heads is 12, expected a multiple of tensor"):
        check_division(config)
