"""A layer says so where Megatron's process groups are not those of its configuration, or where it cannot train."""

import pytest
import torch

from nemo_skymoe.config import ConfigurationError
from tests.moe.worlds import Layout, configuration, groups, model_chunk, on_ranks

CONTRADICTIONS = [
    # The groups that there are, those that the configuration describes, and the option that is named.
    (Layout(tp=2, ep=2), Layout(), "tensor_model_parallel_size is 1, but .* made for 2"),
    (Layout(), Layout(tp=2, ep=2), "tensor_model_parallel_size is 2, but .* made for 1"),
    (Layout(cp=2), Layout(), "context_parallel_size is 1, but .* made for 2"),
    (Layout(ep=2), Layout(), "expert_model_parallel_size is 1, but .* made for 2"),
    (Layout(), Layout(ep=2), "expert_model_parallel_size is 2, but .* made for 1"),
    # What is most easily forgotten: unset, it is the tensor-parallel size.
    (
        Layout(tp=2, etp=1),
        Layout(tp=2, etp=2),
        "expert_tensor_parallel_size is 2, but .* made for 1: .*unset",
    ),
]


@on_ranks(2)
def test_other_process_groups_than_the_configurations_are_refused() -> None:
    for there, described, message in CONTRADICTIONS:
        with groups(there), pytest.raises(ConfigurationError, match=message):
            model_chunk(configuration(described))
    with groups(Layout(tp=2, ep=2)):
        model_chunk(configuration(Layout(tp=2, ep=2)))


@on_ranks(2)
def test_tensor_parallelism_alone_serves_and_does_not_train() -> None:
    layout = Layout(tp=2, ep=2, sp=False)
    with groups(layout):
        layer = model_chunk(configuration(layout)).decoder.layers[0].mlp
        x = torch.ones(4, 1, 16, dtype=torch.float64)
        with pytest.raises(
            ConfigurationError, match="sequence_parallel is False with tensor_model_parallel_size=2"
        ):
            layer(x)
        layer.eval()
        assert layer(x)[0].shape == x.shape
