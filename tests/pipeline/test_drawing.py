"""The picture of a schedule: a box an operation, a number in each where there is room."""

from pathlib import Path

from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from nemo_skymoe.pipeline.drawing import draw_schedule
from nemo_skymoe.pipeline.layout import Layout
from nemo_skymoe.pipeline.problem import Block, PipelineProblem
from nemo_skymoe.pipeline.simulator import Simulation, simulate
from tests.cases import every


def simulated(stages: int, virtual: int, micro_batches: int, recomputed: int = 0) -> Simulation:
    layer = Block("layer", 0.010, 0.020, 1.0, 2.0, checkpoint=1.0, recompute=0.010)
    blocks = [
        Block("embedding", 0.001, 0.001, 1.0, 1.0),
        *[layer] * 2 * stages * virtual,
        Block("head", 0.01, 0.01, 1.0, 1.0),
    ]
    problem = PipelineProblem(blocks, stages, micro_batches, 1e9, virtual, transfer=0.002)
    inner = range(3, len(blocks) - 2, 2)
    return simulate(Layout(problem, (0, *inner, len(blocks)), (recomputed,) + (0,) * (stages * virtual - 1)))


def boxes(figure: Figure) -> int:
    return sum(len(collection.get_paths()) for collection in figure.axes[0].collections)


@every(("virtual", "recomputed"), [(1, 0), (1, 2), (2, 0)])
def test_every_operation_has_a_box_and_a_number(virtual: int, recomputed: int):
    simulation = simulated(3, virtual, 6, recomputed)
    figure = draw_schedule(simulation)
    assert boxes(figure) == len(simulation.events)
    numbers = [int(text.get_text()) for text in figure.axes[0].texts]
    assert sorted(numbers) == sorted(2 * 3 * virtual * list(range(1, 7)))
    legend = figure.axes[0].get_legend()
    assert legend is not None
    kinds = ["forward", *(["recompute"] if recomputed else []), "backward", "idle"]
    assert [text.get_text() for text in legend.get_texts()] == kinds


def test_boxes_are_where_the_events_are():
    simulation = simulated(3, 1, 4, recomputed=1)
    drawn = set()
    for collection in draw_schedule(simulation).axes[0].collections:
        for path in collection.get_paths():
            box = path.get_extents()
            drawn.add((round((box.y0 + box.y1) / 2), round(box.x0, 9), round(box.x1, 9)))
    assert drawn == {(event.stage, round(event.start, 9), round(event.end, 9)) for event in simulation.events}


def test_labels_say_what_a_stage_holds():
    axes = draw_schedule(simulated(3, 1, 6, recomputed=2)).axes[0]
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == ["stage 0: E+2, 2 recomputed", "stage 1: 2", "stage 2: 2+L"]
    assert axes.get_title(loc="left").startswith("3 stages, 6 micro-batches: ")
    assert draw_schedule(simulated(2, 1, 2), title="mine").axes[0].get_title(loc="left") == "mine"


def test_later_virtual_stages_are_darker():
    faces = [to_rgb(c.get_facecolor()[0]) for c in draw_schedule(simulated(2, 2, 4)).axes[0].collections]
    assert len({sum(face) for face in faces}) == 4


def test_numbers_stay_out_where_they_would_not_fit():
    simulation = simulated(4, 1, 200)
    figure = draw_schedule(simulation)
    assert boxes(figure) == len(simulation.events)
    assert not figure.axes[0].texts


@every(("ending", "magic"), [("svg", b"<?xml"), ("png", b"\x89PNG")])
def test_can_be_saved(ending: str, magic: bytes, tmp_path: Path):
    file = tmp_path / f"schedule.{ending}"
    draw_schedule(simulated(4, 1, 8)).savefig(file)
    assert file.read_bytes().startswith(magic)
