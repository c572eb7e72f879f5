"""The look of every figure of a report: style, colours, lines, keys (matplotlib's object interface, Agg)."""

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from io import BytesIO
from typing import Any, cast

import numpy as np

from nemo_skymoe.report.curves import Curve

DPI = 130
INK, GREY, GRID = "#222222", "#8a8a8a", "#e6e6e6"
# Okabe and Ito's palette, which survives every common colour blindness; its yellow is too faint on white.
RUN_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
FEW_LAYERS = 8
ROUND_STEPS = (1, 2, 2.5, 5, 10)
LINE_HEIGHT = 12.0  # points between two labels at the right margin
STYLE = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.edgecolor": GREY,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "legend.title_fontsize": 9,
}


def style() -> AbstractContextManager[None]:
    """Return the context in which figures are made and saved."""
    from matplotlib import rc_context

    return rc_context(cast(Any, STYLE))


def new_figure(panels: int, width: float, height: float) -> tuple[Any, list[Any]]:
    """Return a figure of `panels` axes side by side, `width` x `height` inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI)
    figure.set_layout_engine("constrained", wspace=0.06)
    return figure, list(figure.subplots(1, panels, squeeze=False)[0])


def png(figure: Any) -> bytes:
    """Return the figure as a PNG file."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png", bbox_inches="tight", pad_inches=0.12, metadata={"Software": None})
    return buffer.getvalue()


def draw_line(axes: Any, curve: Curve, colour: Any, offset: int = 0, **style: Any) -> None:
    """Draw the curve as a line with gaps where values are not finite, beginning `offset` steps to the right."""
    values = np.where(np.isfinite(curve.values), curve.values, np.nan)
    # A line through a single point is invisible.
    marker = "o" if len(values) - curve.lost == 1 else ""
    axes.plot(curve.steps + offset, values, color=colour, marker=marker, markersize=4, **style)


def finish_axes(axes: Any, title: str, floor: float | None = None) -> None:
    """Set title and ticks. `floor`, the least possible value, bounds the axis below."""
    from matplotlib.ticker import MaxNLocator, ScalarFormatter, StrMethodFormatter

    axes.set_title(title)
    axes.set_xlabel("optimizer step")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=ROUND_STEPS, integer=True))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=ROUND_STEPS))
    axes.yaxis.set_major_formatter(ScalarFormatter(useOffset=False))
    axes.margins(x=0.01)
    if floor is not None:
        # Values on the floor would lie half hidden under the axis.
        low, high = floor, max(axes.get_ylim()[1], floor + 1e-9)
        axes.set_ylim(low - 0.015 * (high - low), high)


def layer_colours(layers: Collection[int]) -> dict[int, Any]:
    """Return a colour for each layer, dark violet (early) to green (late)."""
    first, last = min(layers), max(layers)
    return {layer: _shade((layer - first) / max(1, last - first)) for layer in sorted(layers)}


def _shade(place: float) -> Any:
    """Return a colour of Viridis without its yellow end, which is too faint on white; `place` is in [0, 1]."""
    from matplotlib import colormaps

    return colormaps["viridis"](0.88 * place)


def add_layer_key(figure: Any, axes: Sequence[Any], colours: dict[int, Any]) -> None:
    """Add a legend at the right for few layers, or a colour bar for many."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    if len(colours) <= FEW_LAYERS:
        handles = [Line2D([], [], color=c, linewidth=2, label=str(layer)) for layer, c in colours.items()]
        figure.legend(handles=handles, title="layer", loc="outside right center", handlelength=1.2)
        return
    first, last = min(colours), max(colours)
    scale = ScalarMappable(Normalize(first, last), ListedColormap([_shade(i / 255) for i in range(256)]))
    bar = figure.colorbar(scale, ax=list(axes), fraction=0.03, pad=0.02, aspect=32)
    inner = MaxNLocator(nbins=6, steps=ROUND_STEPS, integer=True).tick_values(first, last)
    room = (last - first) / 12
    bar.set_ticks([first, *(tick for tick in inner if first + room < tick < last - room), last])
    bar.ax.yaxis.set_major_formatter("{x:.0f}")
    bar.ax.set_title("layer", fontsize=9, loc="center", pad=9)
    bar.outline.set_visible(False)
    bar.ax.grid(False)


def label_ends(axes: Any, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Write (x, y, label, colour) beside the end of each line.

    Lines that reach the right margin are labelled there, and moved apart where the labels would overlap. A line that
    ends earlier is labelled below its end, which is the free side of a falling curve.
    """
    from matplotlib.patheffects import withStroke

    halo = [withStroke(linewidth=3, foreground="white")]
    rightmost = max(x for x, *_ in ends)
    width = rightmost - min(axes.dataLim.x0, rightmost)
    at_margin = sorted((end for end in ends if end[0] >= rightmost - 0.03 * width), key=lambda end: end[1])
    axes.figure.draw_without_rendering()  # fixes the layout, which distances in points depend on
    heights = [axes.transData.transform((x, y))[1] * 72 / axes.figure.dpi for x, y, *_ in at_margin]
    style = {"textcoords": "offset points", "path_effects": halo, "annotation_clip": False}
    floor = axes.bbox.y0 * 72 / axes.figure.dpi + LINE_HEIGHT / 2
    for end, height, place in zip(at_margin, heights, spread(heights, LINE_HEIGHT, floor), strict=True):
        _, y, label, colour = end
        axes.annotate(label, (rightmost, y), (8, place - height), va="center", color=colour, **style)
    for x, y, label, colour in (end for end in ends if end not in at_margin):
        axes.annotate(label, (x, y), (0, -9), ha="right", va="top", color=colour, **style)


def spread(places: Sequence[float], gap: float, floor: float) -> list[float]:
    """Move ascending `places` as little as possible (least squares), so that they are `gap` apart and above `floor`."""
    blocks: list[list[float]] = []  # places less their index times the gap, pooled to their mean
    for index, place in enumerate(places):
        blocks.append([place - index * gap])
        while len(blocks) > 1 and np.mean(blocks[-2]) > np.mean(blocks[-1]):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    pooled = [max(floor, float(np.mean(block))) for block in blocks for _ in block]
    return [place + index * gap for index, place in enumerate(pooled)]
