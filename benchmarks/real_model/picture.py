"""The curves of the two trainings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.real_model.training import BEFORE, NAMES
from nemo_skymoe.report import drawing
from nemo_skymoe.report.curves import TRAIN_LOSS, Curve


def draw(parts: Mapping[str, Any]) -> bytes:
    """Return the picture: losses of both, and drop rates and coefficients of the MoE's layers."""
    names = [name for name in NAMES if f"training of {name}" in parts]
    trained = {name: parts[f"training of {name}"]["curves"] for name in names}
    held_out = {
        name: [parts["function, copy"][BEFORE[name]], parts[f"export of {name}"]["loss"]]
        for name in names
        if f"export of {name}" in parts
    }
    with drawing.style():
        figure, (losses, drops, coefficients) = drawing.new_figure(3, 11.0, 2.9)
        for (name, curves), colour in zip(trained.items(), drawing.RUN_COLOURS, strict=False):
            train = curve(curves[TRAIN_LOSS])
            drawing.draw_line(losses, train, colour, linewidth=0.5, alpha=0.4)
            drawing.draw_line(losses, train.smoothed(0.15), colour, linewidth=1.3, label=NAMES[name])
            if name in held_out:
                losses.plot([0, train.steps[-1]], held_out[name], "o", color=colour, markersize=4)
        drawing.finish_axes(losses, "loss (lines smoothed; dots: held out)")
        losses.legend()
        for axes, metric, title in (
            (drops, "virtual_drop_rate", "virtual drop rate, mean and range of the layers"),
            (coefficients, "aux_loss_coefficient", "auxiliary-loss coefficient, the same"),
        ):
            mean, least, largest = (
                curve(trained["moe"][f"{metric}, {name}"]) for name in ("mean", "least", "largest")
            )
            axes.fill_between(
                mean.steps,
                least.values,
                largest.values,
                color=drawing.RUN_COLOURS[1],
                alpha=0.15,
                linewidth=0,
            )
            drawing.draw_line(axes, mean, drawing.RUN_COLOURS[1], linewidth=1.3)
            drawing.finish_axes(axes, title, floor=0.0)
        return drawing.png(figure)


def curve(points: Mapping[str, float]) -> Curve:
    """Return a curve that was kept as JSON."""
    return Curve.from_points({int(step): value for step, value in points.items()})
