"""The page of the published model says what was measured; parts are measured once; sums are done right."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter
from torch.nn.functional import cross_entropy

from benchmarks.real_model import function, page, training
from benchmarks.real_model.results import RESULTS, Results

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def parts() -> dict[str, Any]:
    return json.loads(RESULTS.read_text())


def test_the_page_is_drawn_from_the_committed_results(parts: dict[str, Any]) -> None:
    assert page.PAGE.read_text() == page.text(parts), "python -m benchmarks.real_model --publish"


def test_what_was_not_measured_is_said(parts: dict[str, Any]) -> None:
    found = page.text({name: part for name, part in parts.items() if name != "conversions"})
    assert "Not measured: conversions." in found and "## Conversions" not in found


def test_the_readme_has_the_results_digits(parts: dict[str, Any]) -> None:
    conversions, losses = (
        line
        for line in (ROOT / "README.md").read_text().splitlines()
        if "python -m benchmarks.real_model" in line
    )
    copy = parts["function, copy"]
    assert f"{parts['conversions']['equal']} of {parts['conversions']['tensors']}; " in conversions
    for dtype in function.DTYPES:
        assert f"{copy[dtype]['relative']:.1e}" in conversions
    exports = [parts[name]["loss"] for name in ("export of moe", "export of dense") if name in parts]
    for number in (copy["dense loss"], copy["loss"], *exports):
        assert f"{number:.4f}" in losses


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
        "moe/virtual_drop_rate_layer_1": {2: 0.1},
        "moe/virtual_drop_rate_layer_2": {2: 0.3},
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
        "virtual_drop_rate, mean": {"2": 0.2},
        "virtual_drop_rate, least": {"2": 0.1},
        "virtual_drop_rate, largest": {"2": 0.3},
    }
