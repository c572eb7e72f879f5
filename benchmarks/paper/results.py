"""Curves as CSV, and what they say: means over the end of a run, paired differences between arms."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from nemo_skymoe.report.curves import TRAIN_LOSS, VALIDATION_LOSS, Curve, layer_curves, read_curves

_KEPT = (TRAIN_LOSS, VALIDATION_LOSS, "lr", "grad_norm", "load_balancing_loss", "moe/")
_DIGITS = 6
END = 0.2
"""Share of a run, its end, that a router metric is averaged over."""


@dataclass(frozen=True)
class Result:
    """A run: how it was made, and its scalars by TensorBoard tag."""

    facts: Mapping[str, Any]
    curves: Mapping[str, Curve]

    @property
    def tokens_per_step(self) -> int:
        """Tokens of an optimizer step."""
        return self.facts["tokens_per_step"]

    @property
    def loss(self) -> float:
        """On held-out text, at the end."""
        return float(self.curves[VALIDATION_LOSS].values[-1])

    @cached_property
    def layers(self) -> int:
        """MoE layers."""
        return len(layer_curves(self.curves, "drop_rate"))

    def by_layer(self, metric: str) -> dict[int, Curve]:
        """A router metric of every layer, by its number from 1."""
        return layer_curves(self.curves, metric)

    def mean_curve(self, metric: str) -> Curve:
        """A router metric, averaged over the layers."""
        curves = list(self.by_layer(metric).values())
        return Curve(curves[0].steps, np.mean([curve.values for curve in curves], axis=0))

    def at_end(self, metric: str, layer: int | None = None) -> float:
        """A router metric over the last fifth of the run, of one layer or averaged over all."""
        curve = self.mean_curve(metric) if layer is None else self.by_layer(metric)[layer]
        return float(np.mean(curve.values[curve.steps > (1 - END) * self.facts["steps"]]))


def versions() -> dict[str, str]:
    """Return the versions of the packages that compute."""
    return {name: version(name) for name in ("torch", "megatron-core", "nemo-toolkit")}


def write(path: Path, facts: Mapping[str, Any], logs: Path) -> None:
    """The scalars in TensorBoard's `logs` as one table: a line of facts, tags, then a row a step; appears at once."""
    curves = {
        tag: curve
        for tag, curve in read_curves(logs).items()
        if tag.startswith(_KEPT) and "/aux_loss_l" not in tag
    }
    # NeMo logs a step's loss under the number of the step before, ours under the number of the steps done.
    ours = [tag for tag in curves if tag.startswith("moe/") or tag == "load_balancing_loss"]
    points = {
        tag: dict(zip((curve.steps + (tag not in ours)).tolist(), curve.values.tolist(), strict=True))
        for tag, curve in curves.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="") as file:
        file.write(f"# {json.dumps(facts)}\n")
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["step", *points])
        for step in sorted({step for found in points.values() for step in found}):
            row = [found.get(step) for found in points.values()]
            table.writerow([step, *("" if value is None else f"{value:.{_DIGITS}g}" for value in row)])
    temporary.replace(path)


def read(path: Path) -> Result:
    """Return the results that `write` wrote."""
    with path.open(newline="") as file:
        facts = json.loads(file.readline().removeprefix("# "))
        rows = list(csv.DictReader(file))
    points: dict[str, dict[int, float]] = {}
    for row in rows:
        step = int(row.pop("step"))
        for tag, value in row.items():
            if value:
                points.setdefault(tag, {})[step] = float(value)
    return Result(facts, {tag: Curve.from_points(found) for tag, found in points.items()})


def losses(runs: Sequence[Result]) -> list[float]:
    """Return the loss of each run on held-out text at its end."""
    return [run.loss for run in runs]


@dataclass(frozen=True)
class Difference:
    """The mean of paired values, and half the width of its 95 % confidence interval (Student's t, n - 1)."""

    mean: float
    error: float
    count: int

    @property
    def verdict(self) -> str:
        """Its sign, where the interval excludes zero."""
        if self.count < 2 or not abs(self.mean) > self.error:
            return "undecided"
        return "lower" if self.mean < 0 else "higher"

    @property
    def bar(self) -> float:
        """Return the length of the error bar, if one can be drawn."""
        return self.error if math.isfinite(self.error) else 0.0

    def __str__(self) -> str:
        return f"{self.mean:+.4f} ± {self.error:.4f}" if self.count > 1 else f"{self.mean:+.4f} (one seed)"


def paired(values: Sequence[float], reference: Sequence[float]) -> Difference:
    """`values` minus `reference`, seed by seed."""
    from scipy.stats import t

    differences = np.asarray(values, dtype=float) - np.asarray(reference, dtype=float)
    count = len(differences)
    if count < 2:
        return Difference(float(differences.mean()), math.inf, count)
    error = float(t.ppf(0.975, count - 1) * differences.std(ddof=1) / math.sqrt(count))
    return Difference(float(differences.mean()), error, count)
