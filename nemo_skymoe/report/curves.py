"""Read scalar curves from the TensorBoard event files of a run."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.report import event_files

TRAIN_LOSS = "reduced_train_loss"
VALIDATION_LOSS = "val_loss"
TRAIN_LOSSES = (TRAIN_LOSS, "lm loss")
VALIDATION_LOSSES = (VALIDATION_LOSS, "lm loss validation")
LEARNING_RATES = ("lr", "learning-rate")
"""The tag of NeMo, and that of Megatron-Bridge."""

_LAYER_TAG = re.compile(r"moe/(?P<metric>\w+)_layer_(?P<layer>\d+)")


@dataclass(frozen=True, eq=False)
class Curve:
    """One scalar over a run: `steps` [N] int64, strictly increasing, and `values` [N] float64."""

    steps: np.ndarray
    values: np.ndarray

    @classmethod
    def from_points(cls, points: Mapping[int, float]) -> "Curve":
        """Return a curve from values by step, in any order."""
        steps = sorted(points)
        return cls(np.array(steps, dtype=np.int64), np.array([points[s] for s in steps], dtype=np.float64))

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def lost(self) -> int:
        """Number of values that are not finite, and so cannot be drawn."""
        return int(np.count_nonzero(~np.isfinite(self.values)))

    @property
    def last(self) -> float | None:
        """The last finite value; None if there is none."""
        finite = self.values[np.isfinite(self.values)]
        return float(finite[-1]) if len(finite) else None

    def smoothed(self, fraction: float = 0.04) -> "Curve":
        """Return the curve with each value replaced by the mean over a centred window of that fraction of the points.

        The window shrinks towards the first point, where a loss falls too fast to be averaged, and is cut off at the
        end. Values that are not finite take no part, and stay gaps.
        """
        index, half = np.arange(len(self)), round(fraction * len(self) / 2)
        begin = index - np.minimum(half, index)
        end = np.minimum(index + np.minimum(half, index) + 1, len(self))
        finite = np.isfinite(self.values)
        sums = np.concatenate([[0.0], np.cumsum(np.where(finite, self.values, 0.0))])
        counts = np.concatenate([[0], np.cumsum(finite)])
        means = (sums[end] - sums[begin]) / np.maximum(counts[end] - counts[begin], 1)
        return Curve(self.steps, np.where(finite, means, np.nan))


@dataclass(frozen=True, eq=False)
class LossCurve:
    """The losses of one labelled run. Its step 0 is drawn at `offset` steps, so that phases can follow one another."""

    label: str
    train: Curve | None = None
    validation: Curve | None = None
    offset: int = 0

    @classmethod
    def of_run(cls, label: str, curves: Mapping[str, Curve], offset: int = 0) -> "LossCurve":
        """Return the losses among the curves that `read_curves` returns."""
        return cls(label, curve_of(curves, TRAIN_LOSSES), curve_of(curves, VALIDATION_LOSSES), offset)


@dataclass(frozen=True, eq=False)
class Logs:
    """The contents of one run's event files: its curves by tag, and sentences on what was left out or put together."""

    curves: dict[str, Curve]
    remarks: list[str]


def read_logs(run_dir: Path) -> Logs:
    """Return every scalar that is logged below `run_dir`, by tag, as `event_files.merge` puts them together.

    Raises:
        ConfigurationError: `run_dir` is no folder, no event file below it holds a scalar, or they are of two runs.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise ConfigurationError(f"RUN_DIR: {run_dir} is not a directory; expected the logs of a run.")
    paths = event_files.find_event_files(run_dir)
    if not paths:
        raise ConfigurationError(f"RUN_DIR: no TensorBoard event file (*tfevents*) anywhere below {run_dir}.")
    files = [event_files.read_event_file(path) for path in paths]
    damages = [file.damage for file in files if file.damage]
    points, remarks = event_files.merge([file for file in files if file.scalars])
    if not points:
        raise ConfigurationError(
            " ".join([f"RUN_DIR: the {len(files)} event file(s) below {run_dir} hold no scalar.", *damages])
        )
    return Logs({tag: Curve.from_points(values) for tag, values in points.items()}, damages + remarks)


def read_curves(run_dir: Path) -> dict[str, Curve]:
    """Return the curves of `read_logs`, for a run whose files are known."""
    return read_logs(run_dir).curves


def curve_of(curves: Mapping[str, Curve], tags: Sequence[str]) -> Curve | None:
    """Return the curve of the first of `tags` that was logged; None if none was."""
    return next((curves[tag] for tag in tags if tag in curves), None)


def layer_curves(telemetry: Mapping[str, Curve], metric: str) -> dict[int, Curve]:
    """Return the curves `moe/<metric>_layer_<number>` in `telemetry` by global layer number, which counts from 1."""
    matches = ((_LAYER_TAG.fullmatch(tag), curve) for tag, curve in telemetry.items())
    layers = {int(m["layer"]): curve for m, curve in matches if m and m["metric"] == metric and len(curve)}
    return dict(sorted(layers.items()))
