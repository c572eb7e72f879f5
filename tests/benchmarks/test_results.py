"""Curves as CSV, and the paired differences that the pages rest on."""

import math
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import ttest_rel
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from benchmarks.paper import results
from benchmarks.paper.results import paired

FACTS = {"steps": 20, "tokens_per_step": 8, "seed": 1}


def logs(folder: Path) -> Path:
    """As NeMo and our callback write them: the loss of step n under n - 1, router metrics under n."""
    scalars = {
        "reduced_train_loss": {step - 1: 5.0 - step / 10 for step in range(1, 21)},
        "val_loss": {9: 4.5, 19: 3.1234567},
        "moe/drop_rate_layer_1": {step: step / 100 for step in range(5, 21, 5)},
        "moe/drop_rate_layer_2": {step: step / 50 for step in range(5, 21, 5)},
        "train_step_timing in s": {1: 0.1},
    }
    writer = EventFileWriter(str(folder))
    for tag, points in scalars.items():
        for step, value in points.items():
            summary = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
            writer.add_event(Event(step=step, summary=summary))
    writer.close()
    return folder


@pytest.fixture
def result(tmp_path: Path) -> results.Result:
    results.write(tmp_path / "run.csv", FACTS, logs(tmp_path / "logs"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["logs", "run.csv"]
    return results.read(tmp_path / "run.csv")


def test_a_run_survives_its_csv(result: results.Result) -> None:
    assert result.facts == FACTS
    assert set(result.curves) == {
        "reduced_train_loss", "val_loss", "moe/drop_rate_layer_1", "moe/drop_rate_layer_2"
    }  # fmt: skip
    assert result.loss == pytest.approx(3.12346, abs=1e-9)  # six digits are kept


def test_losses_and_router_metrics_of_a_step_share_its_row(result: results.Result) -> None:
    assert result.curves["reduced_train_loss"].steps.tolist() == list(range(1, 21))
    assert result.curves["val_loss"].steps.tolist() == [10, 20]
    assert result.by_layer("drop_rate")[1].steps.tolist() == [5, 10, 15, 20]


def test_the_end_is_the_last_fifth(result: results.Result) -> None:
    assert result.at_end("drop_rate", 2) == pytest.approx(0.4)
    assert result.at_end("drop_rate") == pytest.approx(0.3)


def test_differences_are_those_of_a_paired_t_test() -> None:
    generator = np.random.default_rng(0)
    for count in (2, 3, 7):
        values, reference = generator.normal(size=(2, count))
        found = paired(values, reference)
        interval = ttest_rel(values, reference).confidence_interval(0.95)
        assert (found.mean - found.error, found.mean + found.error) == pytest.approx(tuple(interval))


def test_a_verdict_needs_an_interval_without_zero() -> None:
    assert paired([1.0, 1.1, 1.05], [2.0, 2.0, 2.0]).verdict == "lower"
    assert paired([2.0, 2.1, 2.05], [1.0, 1.0, 1.0]).verdict == "higher"
    assert paired([1.0, 3.0, 2.0], [2.0, 2.0, 2.1]).verdict == "undecided"
    alone = paired([1.0], [2.0])
    assert alone.verdict == "undecided" and math.isinf(alone.error) and "one seed" in str(alone)
