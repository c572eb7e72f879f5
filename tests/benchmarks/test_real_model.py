"""The published model: parts are measured once, and sums are done right."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter
from torch.nn.functional import cross_entropy

from benchmarks.real_model import function, training
from benchmarks.real_model.results import Results


def test_a_part_is_measured_once(tmp_path: Path) -> None:
    calls: list[int] = []
    for _ in range(2):
        results = Results(tmp_path / "results.json")
        assert results.part("a", lambda: calls.append(1) or {"digit": 1.5}) == {"digit": 1.5}
    assert calls == [1]


def test_differences_are_relative_to_the_largest_logit() -> None:
    expected = torch.tensor([[1.0, -4.0, 2.0, 0.0]])
    found = expected + torch.tensor([[0.0, 0.0, 1.0, -0.5]])
    assert function.difference(found, expected) == {"relative": 0.25, "equal": 0.5}


def test_the_loss_is_the_mean_over_all_tokens() -> None:
    table = torch.randn(7, 7, generator=torch.Generator().manual_seed(0))

    class Model:
        def __call__(self, tokens: torch.Tensor) -> Any:
            return type("Output", (), {"logits": table[tokens]})

    tokens = torch.tensor([[0, 1, 2, 3], [4, 5, 6, 0]])
    expected = cross_entropy(table[tokens[:, :-1].flatten()].double(), tokens[:, 1:].flatten())
    assert function.loss(Model(), tokens) == pytest.approx(expected.item(), rel=1e-12)


def test_curves_count_the_steps_that_are_done(tmp_path: Path) -> None:
    """NeMo's loss of step n is under n - 1; layers are summed up by their mean and range."""
    scalars = {
        "reduced_train_loss": {0: 3.0, 1: 2.0},
        "moe/drop_rate_layer_1": {2: 0.1},
        "moe/drop_rate_layer_2": {2: 0.3},
    }
    writer = EventFileWriter(str(tmp_path))
    for tag, points in scalars.items():
        for step, value in points.items():
            writer.add_event(
                Event(step=step, summary=Summary(value=[Summary.Value(tag=tag, simple_value=value)]))
            )
    writer.close()
    assert training.curves(tmp_path) == {
        "reduced_train_loss": {"1": 3.0, "2": 2.0},
        "drop_rate, mean": {"2": 0.2},
        "drop_rate, least": {"2": 0.1},
        "drop_rate, largest": {"2": 0.3},
    }
