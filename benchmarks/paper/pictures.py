"""The parts that the figures' pictures share: a line per arm over tokens with the seeds' spread, and points to compare."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.paper.results import Difference, Result
from nemo_skymoe.report import drawing
from nemo_skymoe.report.curves import TRAIN_LOSS, Curve

MILLION = 1e6


def grid(rows: int, columns: int, width: float = 3.6, height: float = 2.7) -> tuple[Any, np.ndarray]:
    """A figure and its axes [rows, columns]."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), dpi=drawing.DPI)
    figure.set_layout_engine("constrained", wspace=0.06, hspace=0.06)
    return figure, figure.subplots(rows, columns, squeeze=False)


def colours(arms: Sequence[str]) -> dict[str, str]:
    """A colour an arm."""
    return dict(zip(arms, drawing.RUN_COLOURS * 2, strict=False))


def train_loss(result: Result) -> Curve:
    """Smoothed over a tenth of the run."""
    return result.curves[TRAIN_LOSS].smoothed(0.1)


def behind(reference: Sequence[Result]) -> Callable[[Result], Curve]:
    """Return a run's training loss minus that of the reference with its seed, which saw the same batches."""
    losses = {run.facts["seed"]: train_loss(run) for run in reference}

    def of(run: Result) -> Curve:
        loss = train_loss(run)
        return Curve(loss.steps, loss.values - losses[run.facts["seed"]].values)

    return of


def router(metric: str, layer: int | None = None) -> Callable[[Result], Curve]:
    """A router metric of a layer, or its mean over all, smoothed over a tenth of the run."""

    def of(result: Result) -> Curve:
        curve = result.mean_curve(metric) if layer is None else result.by_layer(metric)[layer]
        return curve.smoothed(0.1)

    return of


def lines(
    axes: Any,
    results: Mapping[str, Sequence[Result]],
    labels: Mapping[str, str],
    curve: Callable[[Result], Curve],
    title: str,
) -> None:
    """The mean over the seeds of every arm against tokens, and the range of the seeds as a band."""
    for arm, colour in colours(list(labels)).items():
        runs = results.get(arm, ())
        if not runs:
            continue
        found = [curve(run) for run in runs]
        values = np.array([each.values for each in found])
        tokens = found[0].steps * runs[0].tokens_per_step / MILLION
        axes.plot(tokens, values.mean(axis=0), color=colour, linewidth=1.3, label=labels[arm])
        axes.fill_between(
            tokens, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.15, linewidth=0
        )
    axes.set_title(title)
    axes.set_xlabel("million tokens")


def beside(
    axes: Any,
    names: Sequence[str],
    report: Sequence[float | None],
    ours: Sequence[float],
    errors: Sequence[float],
    title: str,
) -> None:
    """The report's readings as open diamonds, ours as points with their errors, a place an arm."""
    places = np.arange(len(names))
    known = [value is not None for value in report]
    axes.plot(
        places[known] - 0.12,
        [value for value in report if value is not None],
        "D",
        color=drawing.GREY,
        markerfacecolor="none",
        label="report",
    )
    axes.errorbar(
        places + 0.12, ours, yerr=errors, fmt="o", color=drawing.INK, markersize=4, capsize=2, label="here"
    )
    axes.set_xticks(places, names)
    axes.set_xlim(-0.6, len(names) - 0.4)
    axes.set_title(title)


def against(
    axes: Any,
    names: Sequence[str],
    report: Sequence[float | None],
    differences: Sequence[Difference],
    title: str,
) -> None:
    """`beside`, of paired differences."""
    beside(
        axes, names, report, [each.mean for each in differences], [each.bar for each in differences], title
    )


def key(figure: Any, axes: Any) -> None:
    """One legend, of the labels of `axes`, to the right."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", handlelength=1.4)


def table(columns: Sequence[str], rows: Sequence[Sequence[object]], alignment: str = "---:") -> list[str]:
    """Markdown; `alignment` of all columns but the first."""
    return [
        "| " + " | ".join(columns) + " |",
        "|" + "|".join(["---", *[alignment] * (len(columns) - 1)]) + "|",
        *("| " + " | ".join("" if cell is None else str(cell) for cell in row) + " |" for row in rows),
    ]


def spread(values: Sequence[float]) -> float:
    """Standard deviation over the seeds; of one seed 0."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def mean_and_spread(values: Sequence[float], digits: int = 4) -> str:
    """Mean and standard deviation over the seeds."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{np.mean(values):.{digits}f} (sd {spread(values):.{digits}f})"
