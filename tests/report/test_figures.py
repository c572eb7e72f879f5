from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from nemo_skymoe.report import drawing
from nemo_skymoe.report.curves import Curve, LossCurve
from nemo_skymoe.report.figures import FIGURE_TITLES, LAYER_FIGURES, draw_figures
from tests.cases import every

METRICS = [panel.metric for figure in LAYER_FIGURES for panel in figure.panels]


def falling(start: float, end: float, count: int = 200) -> Curve:
    return Curve(np.arange(count), end + (start - end) * np.exp(-np.arange(count) / 10))


def telemetry(layers: int, scale: float = 1.0) -> dict[str, Curve]:
    return {
        f"moe/{metric}_layer_{layer}": falling(2.0, 1.0 + scale * layer / layers)
        for metric in METRICS
        for layer in range(1, layers + 1)
    }


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(BytesIO(png)).convert("RGB")).astype(int)


def test_every_figure_is_drawn_once_in_order():
    pictures = draw_figures([LossCurve("a", falling(10, 2))], telemetry(3))
    assert [picture.name for picture in pictures] == list(FIGURE_TITLES)
    for picture in pictures:
        image = pixels(picture.png)
        assert min(image.shape[:2]) > 300
        # Coloured pixels: a frame of grey axes alone would have none.
        assert np.count_nonzero(np.ptp(image, axis=2) > 60) > 300, picture.name


@every("figure", LAYER_FIGURES, ids=lambda figure: figure.name)
def test_each_panel_shows_its_own_metric(figure):
    for panel in figure.panels:
        base = {panel.metric: 1.0 for panel in figure.panels}
        drawings = []
        for change in (0.0, 1.0):
            ends = base | {panel.metric: base[panel.metric] + change}
            curves = {
                f"moe/{metric}_layer_{n}": falling(5.0, end + n / 9)
                for metric, end in ends.items()
                for n in (1, 2)
            }
            (picture,) = draw_figures([], curves)
            drawings.append(picture.png)
        assert drawings[0] != drawings[1]


def test_the_same_data_give_the_same_bytes():
    first, second = (draw_figures([LossCurve("a", falling(9, 2))], telemetry(12)) for _ in range(2))
    assert first == second


def test_a_run_with_an_offset_is_drawn_further_right():
    def leftmost(offset: int) -> int:
        runs = [LossCurve("long", falling(3, 2, 400)), LossCurve("late", falling(3.5, 2.5), offset=offset)]
        (picture,) = draw_figures(runs, {})
        red, green, blue = (pixels(picture.png)[..., channel] for channel in range(3))
        return int(np.argwhere((red > 180) & (green < 130) & (blue < 60))[:, 1].min())

    # The second run is vermilion; its axis is 400 steps wide.
    assert leftmost(100) - leftmost(0) == pytest.approx(leftmost(200) - leftmost(100), abs=3)
    assert leftmost(100) - leftmost(0) > 100


def test_validation_is_drawn_as_dots_and_named_in_the_caption():
    run = falling(3, 2)
    (bare,) = draw_figures([LossCurve("a", run)], {})
    (dotted,) = draw_figures([LossCurve("a", run, Curve.from_points({50: 2.8, 150: 2.6}))], {})
    (alone,) = draw_figures([LossCurve("a", None, Curve.from_points({50: 2.8, 150: 2.6}))], {})
    assert "dots: validation" in dotted.caption and "dots" not in bare.caption
    assert len({bare.png, dotted.png, alone.png}) == 3


def test_the_caption_says_where_the_axis_is_cut():
    steep, flat = Curve(np.arange(200), falling(11, 3).values), Curve(np.arange(200), np.linspace(3, 2, 200))
    assert "axis is cut" in draw_figures([LossCurve("a", steep)], {})[0].caption
    noise = Curve(np.arange(200), np.linspace(2.1, 2, 200) + np.random.default_rng(0).normal(0, 0.1, 200))
    for uncut in (flat, noise):
        assert "axis is cut" not in draw_figures([LossCurve("a", uncut)], {})[0].caption


def test_figures_without_data_are_left_out_and_a_lone_panel_is_named():
    assert draw_figures([LossCurve("a"), LossCurve("b", Curve.from_points({0: np.nan}))], {}) == []
    curve = Curve.from_points({0: 1.5, 1: 1.2})
    (picture,) = draw_figures([], {"moe/gate_entropy_layer_1": curve, "moe/unknown_layer_1": curve})
    assert picture.name == "load" and "Not logged: Largest / mean expert load." in picture.caption


def test_values_that_are_not_finite_are_counted_in_the_caption():
    values = np.array([3.0, np.nan, 2.5, np.inf, 2.0])
    (losses,) = draw_figures([LossCurve("a", Curve(np.arange(5), values))], {})
    (ratios,) = draw_figures([], {"moe/max1_over_max2_layer_1": Curve(np.arange(5), values)})
    for picture in (losses, ratios):
        assert "2 logged value(s) that are not finite are left out." in picture.caption


@every("points", [{0: 2.0}, {5: 0.0, 6: 0.0}])
def test_a_single_step_and_a_constant_are_drawn(points):
    curve = Curve.from_points(points)
    pictures = draw_figures([LossCurve("a", curve)], {f"moe/{metric}_layer_1": curve for metric in METRICS})
    assert [picture.name for picture in pictures] == list(FIGURE_TITLES)


def test_layers_are_told_apart_by_a_legend_or_a_colour_bar():
    few, many = drawing.layer_colours(range(1, 5)), drawing.layer_colours(range(1, 53))
    assert few[1] == many[1] and few[4] == many[52]
    luminance = [np.dot(colour[:3], [0.2126, 0.7152, 0.0722]) for colour in many.values()]
    assert np.all(np.diff(luminance) > 0)


def test_labels_are_spread_as_little_as_possible():
    assert drawing.spread([0.0, 50.0], 10.0, floor=0.0) == [0.0, 50.0]
    assert drawing.spread([20.0, 20.0, 20.0], 10.0, floor=0.0) == [10.0, 20.0, 30.0]
    assert drawing.spread([2.0, 2.0, 90.0], 10.0, floor=5.0) == [5.0, 15.0, 90.0]


def test_a_virtual_drop_rate_is_drawn_and_called_so() -> None:
    curve = Curve.from_points({1: 0.1, 2: 0.2})
    real = {picture.name: picture for picture in draw_figures([], {"moe/drop_rate_layer_1": curve})}
    virtual = {
        picture.name: picture for picture in draw_figures([], {"moe/virtual_drop_rate_layer_1": curve})
    }
    assert "Virtual token drop rate" in virtual["drop_rate"].caption
    assert "Virtual" not in real["drop_rate"].caption
    assert real["drop_rate"].png != virtual["drop_rate"].png
