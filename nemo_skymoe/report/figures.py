"""The figures of a report, and their captions."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from nemo_skymoe.report import drawing
from nemo_skymoe.report.curves import Curve, LossCurve, layer_curves


@dataclass(frozen=True)
class Picture:
    """A drawn figure: file stem, heading, PNG bytes and a caption of plain text."""

    name: str
    title: str
    png: bytes
    caption: str


@dataclass(frozen=True)
class Panel:
    """One metric over steps, with a line for each layer. `floor` is the least value that it can take."""

    metric: str
    label: str
    floor: float | None = None
    smooth: bool = True


@dataclass(frozen=True)
class LayerFigure:
    """Panels side by side, and the figure of the report that they correspond to."""

    name: str
    title: str
    panels: tuple[Panel, ...]
    caption: str


LAYER_FIGURES = (
    LayerFigure(
        "drop_rate",
        "Token drop rate and auxiliary-loss coefficient",
        (
            Panel("drop_rate", "Token drop rate", floor=0.0),
            Panel("aux_loss_coefficient", "Auxiliary-loss coefficient", floor=0.0, smooth=False),
        ),
        "Dropped assignments as a fraction of all assignments, and the coefficient that each layer's "
        "auxiliary loss is multiplied by, against optimizer step; compare Figure 4 of the report, which "
        "shows both for the 146B model against tokens.",
    ),
    LayerFigure(
        "gate_ratios",
        "Sharpness of the gate",
        (
            Panel("max1_over_max2", "Max1 / Max2", floor=1.0),
            Panel("max2_over_max3", "Max2 / Max3", floor=1.0),
        ),
        "Ratio of the largest to the second largest gate probability, and of the second to the third, "
        "against optimizer step (1: the gate cannot tell them apart); compare Figure 3 of the report, which "
        "shows one gate of a 2.5B model against tokens.",
    ),
    LayerFigure(
        "expert_similarity",
        "Expert similarity",
        (Panel("expert_similarity", "Expert similarity", smooth=False),),
        "Mean similarity over all pairs of experts of a layer against optimizer step (1: identical experts); "
        "compare Figure 1 (right) of the report, which shows one curve for each model against tokens.",
    ),
    LayerFigure(
        "load",
        "Expert load and gate entropy",
        (
            Panel("load_max_over_mean", "Largest / mean expert load", floor=1.0),
            Panel("gate_entropy", "Gate entropy"),
        ),
        "Tokens of the busiest expert over the mean of all experts (1: perfect balance), and the entropy of "
        "the gate distribution, against optimizer step; the report has no such figure.",
    ),
)
FIGURE_TITLES = {"losses": "Losses", **{figure.name: figure.title for figure in LAYER_FIGURES}}


def draw_figures(losses: Sequence[LossCurve], telemetry: Mapping[str, Curve]) -> list[Picture]:
    """Return the figures in the order of `FIGURE_TITLES`, without those that have no data."""
    with drawing.style():
        pictures = [_draw_losses(losses), *(_draw_layers(spec, telemetry) for spec in LAYER_FIGURES)]
    return [picture for picture in pictures if picture is not None]


def _draw_losses(losses: Sequence[LossCurve]) -> Picture | None:
    """Draw all runs on one axis: training loss faint and smoothed, validation as dots. Return None without any loss."""
    runs = [run for run in map(_with_data_only, losses) if run.train or run.validation]
    if not runs:
        return None
    figure, (axes,) = drawing.new_figure(1, width=7.4, height=4.0)
    colours = [drawing.RUN_COLOURS[i % len(drawing.RUN_COLOURS)] for i in range(len(runs))]
    for run, colour in zip(runs, colours, strict=True):
        _draw_run(axes, run, colour)
    drawing.finish_axes(axes, "Loss (nats per token)")
    cut = _cut_first_descent(axes, runs)
    drawing.label_ends(axes, [_end(run, colour) for run, colour in zip(runs, colours, strict=True)])
    dots = ", dots: validation" if any(run.validation for run in runs) else ""
    clauses = [
        "Loss against optimizer step",
        "faint: every logged step, line: mean over 4% of the run, with its last "
        f"value beside the label{dots}",
    ]
    if any(run.offset for run in runs):
        clauses.append("a run that continues another begins where that one ended")
    if cut:
        clauses.append(
            "the vertical axis is cut, a run's first fifth and single spikes may leave it at the top"
        )
    clauses.append("compare Figure 1 (left and middle) of the report, which is drawn against tokens.")
    caption = "; ".join(clauses) + _lost(
        curve for run in runs for curve in (run.train, run.validation) if curve
    )
    return Picture("losses", FIGURE_TITLES["losses"], drawing.png(figure), caption)


def _panel_of_run(panel: Panel, telemetry: Mapping[str, Curve]) -> Panel:
    """Return the panel with the metric's name in this run: the drop rate of dropless training is a virtual one."""
    virtual = f"virtual_{panel.metric}"
    if layer_curves(telemetry, panel.metric) or not layer_curves(telemetry, virtual):
        return panel
    return replace(panel, metric=virtual, label=f"Virtual {panel.label.lower()}")


def _draw_layers(spec: LayerFigure, telemetry: Mapping[str, Curve]) -> Picture | None:
    """Draw a line for each layer, coloured early to late, in each panel that has data. Return None if none has."""
    panels = [_panel_of_run(panel, telemetry) for panel in spec.panels]
    layers = {panel: layer_curves(telemetry, panel.metric) for panel in panels}
    layers = {panel: curves for panel, curves in layers.items() if any(map(_has_data, curves.values()))}
    if not layers:
        return None
    figure, all_axes = drawing.new_figure(len(layers), width=9.2 if len(layers) > 1 else 6.4, height=3.4)
    colours = drawing.layer_colours({layer for curves in layers.values() for layer in curves})
    for axes, (panel, curves) in zip(all_axes, layers.items(), strict=True):
        for layer, curve in curves.items():
            drawn = curve.smoothed() if panel.smooth else curve
            drawing.draw_line(axes, drawn, colours[layer], linewidth=1.2)
        drawing.finish_axes(axes, panel.label, panel.floor)
    drawing.add_layer_key(figure, all_axes, colours)
    smoothed = ", ".join(panel.label for panel in layers if panel.smooth)
    absent = ", ".join(panel.label for panel in panels if panel not in layers)
    caption = spec.caption
    caption += f" Drawn as a mean over 4% of the run: {smoothed}." if smoothed else ""
    caption += f" Not logged: {absent}." if absent else ""
    caption += _lost(curve for curves in layers.values() for curve in curves.values())
    return Picture(spec.name, spec.title, drawing.png(figure), caption)


def _has_data(curve: Curve | None) -> bool:
    return curve is not None and curve.last is not None


def _with_data_only(run: LossCurve) -> LossCurve:
    train, validation = (curve if _has_data(curve) else None for curve in (run.train, run.validation))
    return LossCurve(run.label, train, validation, run.offset)


def _lost(curves: Iterable[Curve]) -> str:
    lost = sum(curve.lost for curve in curves)
    return f" {lost} logged value(s) that are not finite are left out." if lost else ""


def _draw_run(axes: Any, run: LossCurve, colour: str) -> None:
    if run.train is not None:
        drawing.draw_line(axes, run.train, colour, run.offset, linewidth=0.6, alpha=0.25)
        drawing.draw_line(axes, run.train.smoothed(), colour, run.offset, linewidth=1.6)
    if run.validation is not None:
        axes.plot(
            run.validation.steps + run.offset, run.validation.values, color=colour, linestyle="", marker="o",
            markersize=4.5, markeredgecolor="white", markeredgewidth=0.7, zorder=3,
        )  # fmt: skip


def _end(run: LossCurve, colour: str) -> tuple[float, float, str, str]:
    """Return where the run ends, its label with the last (smoothed) loss, and its colour."""
    curve = run.train.smoothed() if run.train else run.validation
    assert curve is not None
    step, loss = curve.steps[np.isfinite(curve.values)][-1] + run.offset, curve.last
    return float(step), float(loss or 0.0), f"{run.label}  {loss:.3f}", colour


def _cut_first_descent(axes: Any, runs: Sequence[LossCurve]) -> bool:
    """Leave the first fifth of each run out of the vertical range, if that at least halves the range."""
    curves = [curve for run in runs for curve in (run.train, run.validation) if curve]
    logged = np.concatenate([curve.values[len(curve) // 5 :] for curve in curves])
    lines = np.concatenate([curve.smoothed().values[len(curve) // 5 :] for curve in curves])
    if not np.isfinite(logged).any():
        return False
    # A quantile, lest a single spike decide, but the line itself stays inside.
    high = max(np.nanmax(lines), np.quantile(logged[np.isfinite(logged)], 0.995))
    low = np.min(logged[np.isfinite(logged)])
    if not np.diff(axes.get_ylim())[0] > 2 * (high - low) > 0:
        return False
    axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    return True
