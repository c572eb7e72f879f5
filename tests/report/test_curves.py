import os
from pathlib import Path

import numpy as np
import pytest

from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.report.curves import Curve, LossCurve, layer_curves, read_curves


def test_every_point_of_every_scalar_is_read(write_events):
    # More than the 10 000 points that TensorBoard keeps of a scalar by default.
    losses = {step: float(step % 7) for step in range(10_500)}
    run_dir = write_events("a/b", {"reduced_train_loss": losses, "val_loss": {100: 2.5}})
    curves = read_curves(run_dir)
    assert sorted(curves) == ["reduced_train_loss", "val_loss"]
    assert np.array_equal(curves["reduced_train_loss"].steps, np.arange(10_500))
    assert np.array_equal(curves["reduced_train_loss"].values, [float(s % 7) for s in range(10_500)])
    assert curves["val_loss"].values.tolist() == [2.5]


@pytest.mark.parametrize("folders", [("first", "second"), ("z", "a")])
def test_a_resumed_run_is_merged_and_the_later_file_wins(write_events, folders):
    """Whatever the folders are called: what counts is when the file was begun, not its path."""
    write_events(folders[0], {"lr": {0: 1.0, 1: 1.0, 2: 1.0, 3: 1.0}, "only_first": {0: 5.0}})
    run_dir = write_events(folders[1], {"lr": {2: 2.0, 3: 2.0, 4: 2.0}})
    # The date of a copied or touched file says nothing either.
    for path in run_dir.glob(f"{folders[1]}/*"):
        os.utime(path, (0, 0))
    curves = read_curves(run_dir)
    assert curves["lr"].steps.tolist() == [0, 1, 2, 3, 4]
    assert curves["lr"].values.tolist() == [1.0, 1.0, 2.0, 2.0, 2.0]
    assert curves["only_first"].values.tolist() == [5.0]


def test_a_file_cut_off_in_the_middle_of_a_record_keeps_its_beginning(write_events):
    run_dir = write_events("", {"lr": {step: 1.0 for step in range(100)}})
    (path,) = run_dir.glob("*tfevents*")
    path.write_bytes(path.read_bytes()[:-10])
    assert read_curves(run_dir)["lr"].steps.tolist() == list(range(99))


def test_missing_logs_are_refused_by_name(tmp_path: Path, write_events):
    with pytest.raises(ConfigurationError, match=f"no TensorBoard event file .* below {tmp_path}"):
        read_curves(tmp_path)
    with pytest.raises(ConfigurationError, match="nowhere is not a directory"):
        read_curves(tmp_path / "nowhere")
    with pytest.raises(ConfigurationError, match="hold no scalar"):
        read_curves(write_events("", {}))


def test_layers_are_ordered_by_number_not_by_name():
    curve = Curve.from_points({0: 1.0})
    tags = ["moe/drop_rate_layer_10", "moe/drop_rate_layer_2", "moe/aux_loss_layer_1", "drop_rate_layer_3"]
    assert list(layer_curves(dict.fromkeys(tags, curve), "drop_rate")) == [2, 10]
    assert list(layer_curves(dict.fromkeys(tags, curve), "aux_loss")) == [1]


def test_smoothing_keeps_a_straight_line_and_the_first_point():
    curve = Curve(np.arange(100), np.linspace(3.0, 1.0, 100))
    smoothed = curve.smoothed(0.1)
    # Half of the window is 5 points; at the end it is cut off, so only those last points are drawn up.
    assert np.allclose(smoothed.values[:-5], curve.values[:-5])
    assert smoothed.values[-1] == pytest.approx(np.mean(curve.values[-6:]))


def test_smoothing_averages_over_the_window_and_leaves_gaps():
    values = np.random.default_rng(0).normal(size=50)
    values[[20, 21]] = np.nan, np.inf
    smoothed = Curve(np.arange(50), values).smoothed(0.2).values
    assert smoothed[30] == pytest.approx(values[25:36].mean())
    assert smoothed[24] == pytest.approx(np.mean(values[[19, 22, 23, 24, 25, 26, 27, 28, 29]]))
    assert np.isnan(smoothed[[20, 21]]).all() and np.isfinite(np.delete(smoothed, [20, 21])).all()


def test_losses_of_a_run_are_found_by_their_tags():
    train, validation = Curve.from_points({0: 1.0}), Curve.from_points({0: 2.0})
    for tags in (("reduced_train_loss", "val_loss"), ("lm loss", "lm loss validation")):
        run = LossCurve.of_run("a", dict(zip(tags, (train, validation), strict=True)), offset=7)
        assert (run.train, run.validation, run.offset) == (train, validation, 7)
    assert LossCurve.of_run("b", {}).train is None
