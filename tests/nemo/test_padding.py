"""Finetuning data pads its sequences: what NeMo's batches say of it reaches the routers."""

from typing import Any

import pytest
import torch
from megatron.core import parallel_state, tensor_parallel
from torch import Tensor

from nemo_skymoe.moe.batch_padding import padding_of
from nemo_skymoe.moe.telemetry import LayerMetrics, reduce_statistics
from nemo_skymoe.nemo.model import SkyworkMoEModel, SkyworkMoETinyConfig
from nemo_skymoe.patches import nemo_cpu
from nemo_skymoe.ranks import run_ranks

LENGTH = 64


class Tokenizer:
    vocab_size = 512


def batch(lengths: list[int], width: int) -> dict[str, Any]:
    """As NeMo's finetuning data collates them: a loss on the answers, the rest of the width padded."""
    tokens = torch.randint(512, (len(lengths), LENGTH), generator=torch.Generator().manual_seed(5))[:, :width]
    position = torch.arange(width).expand(len(lengths), -1)
    end = torch.tensor(lengths)[:, None]
    return {
        "tokens": torch.where(position < end, tokens, 0),
        "labels": tokens.roll(-1, dims=1),
        "loss_mask": ((position >= 4) & (position < end)).long(),
        "position_ids": position,
        "attention_mask": torch.ones(width, width, dtype=torch.bool).triu(1).view(1, 1, width, width),
        "token_count": [length + 1 for length in lengths],
    }


def metrics_of(batches: list[dict[str, Any]], recomputed: bool) -> list[LayerMetrics]:
    """All forward passes before the first backward pass, as a pipeline's first stage does it."""
    options: dict[str, Any] = {}
    if recomputed:
        options = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    nemo_cpu.apply()
    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel(expert_tensor_parallel_size=1)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    config = SkyworkMoETinyConfig(seq_length=LENGTH, moe_expert_capacity_factor=None, **options)
    model: Any = SkyworkMoEModel(config, tokenizer=Tokenizer())
    model._trainer = None
    model.configure_model()
    losses: list[Tensor] = []
    loader = iter(batches)
    for _ in batches:
        losses.append(model.training_step(model.data_step(loader)))
    for loss in losses:
        loss.sum().backward()
    group: Any = torch.distributed.group.WORLD
    routers = [layer.mlp.router for layer in model.module.decoder.layers]
    return reduce_statistics([router.statistics for router in routers], group, torch.device("cpu"))


def test_padded_batches_are_observed_as_their_tokens_are() -> None:
    """Drop rate, load and gate of half-padded sequences are those of the sequences alone, recomputed or not."""
    padded = [batch([32, 32], LENGTH), batch([48, 48], LENGTH)]
    alone = [batch([32, 32], 32), batch([48, 48], 48)]
    expected = run_ranks(metrics_of, 1, alone, False)[0]
    for recomputed in (False, True):
        found = run_ranks(metrics_of, 1, padded, recomputed)[0]
        for layer, (a, b) in enumerate(zip(found, expected, strict=True)):
            assert b.drop_rate > 0
            for name, value in vars(b).items():
                assert getattr(a, name) == pytest.approx(value, rel=1e-5), (layer, name, recomputed)


def test_what_is_padding() -> None:
    mask = padding_of({"loss_mask": torch.tensor([[0, 0, 1, 1, 0], [1, 0, 1, 0, 0], [0, 0, 0, 0, 0]])})
    assert mask is not None
    assert mask.tolist() == [[False] * 4 + [True], [False] * 3 + [True] * 2, [True] * 5]
    given = torch.tensor([[True, False, False]])
    assert padding_of({"padding_mask": given, "loss_mask": torch.tensor([[1, 1, 0]])}) is given
    for nothing in ({"loss_mask": torch.ones(2, 4)}, {"tokens": torch.ones(2, 4)}, {"loss_mask": None}, None):
        assert padding_of(nothing) is None
