"""A picture of a simulated step, like the report's Figure 6: one row per stage, with time to the right."""

from itertools import groupby
from typing import TYPE_CHECKING

from nemo_skymoe.pipeline.layout import Layout
from nemo_skymoe.pipeline.simulator import Event, Simulation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = {"forward": (0.27, 0.52, 0.93), "recompute": (0.96, 0.71, 0.24), "backward": (0.24, 0.65, 0.45)}
_IDLE, _INK, _MUTED, _BOX_INK = "#E9ECF0", "#1F2933", "#66727F", "#FFFFFF"
_ROW = 0.84  # height of a box, where a row is 1
_WIDTH, _BOXES_WIDTH = 13.0, 11.0  # inches
_POINTS = 72.0  # to the inch
_LARGEST_FONT, _SMALLEST_FONT = 9.0, 4.5  # points


def draw_schedule(simulation: Simulation, title: str | None = None) -> "Figure":
    """Draw one box for each operation, with the number of its micro-batch if there is room; grey is idle time.

    Waiting for a transfer counts as idle. Later virtual stages are darker. The text at the left of a row says what the
    stage holds. The figure belongs to no window: `savefig` writes it as SVG, PNG or PDF.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    layout = simulation.layout
    height = 1.2 + 0.4 * layout.problem.stages
    figure = Figure(figsize=(_WIDTH, height), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.barh(range(layout.problem.stages), simulation.duration, _ROW, color=_IDLE, linewidth=0)
    _draw_boxes(axes, simulation)
    _draw_numbers(axes, simulation)
    _draw_labels(axes, simulation, title)
    return figure


def _draw_boxes(axes: "Axes", simulation: Simulation) -> None:
    problem = simulation.layout.problem
    points = simulation.duration / (_BOXES_WIDTH * _POINTS)
    narrowest = min(
        (event.end - event.start for event in simulation.events if event.end > event.start), default=0
    )
    line = min(0.8, 0.15 * narrowest / points)

    def look(event: Event) -> tuple[int, str, int]:
        return event.stage, event.kind, event.chunk

    for (stage, kind, chunk), events in groupby(sorted(simulation.events, key=look), key=look):
        shade = 1.0 - 0.38 * chunk / max(1, problem.virtual_stages - 1)
        axes.broken_barh(
            [(event.start, event.end - event.start) for event in events],
            (stage - _ROW / 2, _ROW),
            facecolor=[shade * part for part in _COLOURS[kind]],
            edgecolor="white",
            linewidth=line,
        )


def _draw_numbers(axes: "Axes", simulation: Simulation) -> None:
    """Write all numbers in one size that fits in the narrowest forward or backward, or write none."""
    numbered = [event for event in simulation.events if event.kind != "recompute" and event.end > event.start]
    digits = len(str(simulation.layout.problem.micro_batches))
    narrowest = min((event.end - event.start for event in numbered), default=0.0)
    room = narrowest / simulation.duration * _BOXES_WIDTH * _POINTS
    size = min(_LARGEST_FONT, 1.4 * room / (digits + 0.3))
    if size < _SMALLEST_FONT:
        return
    for event in numbered:
        axes.text(
            (event.start + event.end) / 2,
            event.stage,
            str(event.micro_batch + 1),
            fontsize=size,
            color=_BOX_INK,
            ha="center",
            va="center_baseline",
        )


def _draw_labels(axes: "Axes", simulation: Simulation, title: str | None) -> None:
    from matplotlib.patches import Patch

    stages = range(simulation.layout.problem.stages)
    scale, unit = (1.0, "s") if simulation.duration >= 1 else (1e3, "ms")
    axes.set_title(title or _summary(simulation), loc="left", fontsize=11, color=_INK, pad=12)
    axes.set_xlim(0, simulation.duration)
    axes.set_ylim(stages[-1] + 0.55, -0.55)
    axes.set_yticks(stages, [_holding(simulation.layout, stage) for stage in stages], fontsize=9, color=_INK)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value * scale:g}")
    axes.set_xlabel(f"time, {unit}", fontsize=9, color=_MUTED)
    axes.tick_params(length=0, axis="y")
    axes.tick_params(length=3, axis="x", labelsize=9, color=_MUTED, labelcolor=_MUTED)
    axes.spines[:].set_visible(False)
    kinds = {event.kind for event in simulation.events}
    shown = [(kind, colour) for kind, colour in _COLOURS.items() if kind in kinds] + [("idle", _IDLE)]
    axes.legend(
        handles=[Patch(facecolor=colour, label=kind) for kind, colour in shown],
        loc="lower right",
        bbox_to_anchor=(1.0, 1.0),
        ncols=len(shown),
        frameon=False,
        fontsize=9,
        handlelength=1.0,
        handleheight=1.0,
        labelcolor=_INK,
        borderaxespad=0.3,
    )


def _summary(simulation: Simulation) -> str:
    problem = simulation.layout.problem
    interleaving = f" x {problem.virtual_stages} virtual" if problem.virtual_stages > 1 else ""
    return (
        f"{problem.stages} stages{interleaving}, {problem.micro_batches} micro-batches:"
        f" {simulation.bubble_fraction:.1%} bubble"
    )


def _holding(layout: Layout, stage: int) -> str:
    """Describe what a stage holds, with E for the embedding and L for the head: `stage 0: E+5, 2 recomputed`."""
    chunks = layout.chunks_of(stage)
    kinds = [block.kind for chunk in chunks for block in chunk.blocks]
    layers = "+".join(str(chunk.layers) for chunk in chunks)
    parts = [
        *(["E"] if "embedding" in kinds else []),
        *([layers] if "layer" in kinds else []),
        *(["L"] if "head" in kinds else []),
    ]
    again = layout.recomputed_layers[stage]
    return f"stage {stage}: {'+'.join(parts)}" + (f", {again} recomputed" if again else "")
