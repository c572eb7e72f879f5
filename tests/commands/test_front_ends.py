"""One definition of a command gives every front end the same options, by name alone."""

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Optional

import pytest
import typer
from typer.testing import CliRunner

from nemo_skymoe.commands.front_ends import REQUIRED, Command, Given, Read, as_plain, as_typer
from nemo_skymoe.config import ConfigurationError


@dataclass(frozen=True, kw_only=True)
class PaintOptions:
    """Paint a picture."""

    canvas: Annotated[Path, typer.Argument(help="File to paint on.")]
    red: Annotated[float, typer.Option(help="Share of red.")] = 0.25
    blue: Annotated[float, typer.Option(help="Share of blue.")] = 0.5
    frame: Annotated[Path | None, typer.Option(help="Of the picture.")] = None
    json: Annotated[bool, typer.Option("--json")] = False


painted: list[PaintOptions] = []
PAINT = Command("paint", PaintOptions, painted.append)


def plain():
    frame = Given({"frame_path": (str, REQUIRED), "gilded": (bool, False)}, gild)
    return as_plain(PAINT, module="somewhere", given={"frame": frame}, fixed={"json": True})


def gild(frame_path: str, gilded: bool = False) -> Path:
    return Path(f"{frame_path}{'.gold' if gilded else ''}")


def test_typer_gives_what_was_given() -> None:
    app = typer.Typer()
    app.command()(as_typer(PAINT))
    answer = CliRunner().invoke(app, ["--help"])
    assert "Paint a picture." in answer.stdout and "Share of blue." in answer.stdout
    assert CliRunner().invoke(app, ["a.png", "--blue", "0.75"]).exit_code == 0
    assert painted.pop() == PaintOptions(canvas=Path("a.png"), blue=0.75)


def test_the_plain_function_has_real_annotations_and_its_own_names() -> None:
    parameters = inspect.signature(plain()).parameters
    assert {name: one.annotation for name, one in parameters.items()} == {
        "canvas": str,
        "red": float,
        "blue": float,
        "frame_path": str,
        "gilded": bool,
    }
    assert [name for name, one in parameters.items() if one.default is one.empty] == ["canvas", "frame_path"]
    assert (plain().__module__, plain().__qualname__, plain().__doc__) == (
        "somewhere",
        "paint",
        "Paint a picture.",
    )
    optional = as_plain(PAINT, module="somewhere")
    assert inspect.signature(optional).parameters["frame"].annotation == Optional[str]  # noqa: UP045
    plain()(canvas="a.png", frame_path="b.png")
    assert painted.pop() == PaintOptions(canvas=Path("a.png"), frame=Path("b.png"), json=True)
    for options in ({"canvas": "a.png"}, {"canvas": "a.png", "frame_path": "b.png", "green": 0.5}):
        with pytest.raises(TypeError):
            plain()(**options)
    for gilded, frame in ((False, "b.png"), (True, "b.png.gold")):
        plain()(canvas="a.png", frame_path="b.png", red=0.125, gilded=gilded)
        expected = PaintOptions(canvas=Path("a.png"), frame=Path(frame), red=0.125, json=True)
        assert painted.pop() == expected


def test_options_are_not_taken_by_position() -> None:
    for function in (as_typer(PAINT), plain()):
        with pytest.raises(TypeError):
            function("a.png", 0.5, 0.25)
    with pytest.raises(TypeError):
        PaintOptions("a.png", 0.5, 0.25)  # type: ignore[misc]


@dataclass(frozen=True, kw_only=True)
class FrameOptions:
    """Frame a picture."""

    size: Annotated[
        tuple[int, ...], Read(lambda name, text: read_size(name, text)), typer.Option(help="4x3.")
    ]
    inner: Annotated[tuple[int, ...] | None, Read(lambda name, text: read_size(name, text))] = None


def read_size(name: str, text: str) -> tuple[int, ...]:
    if "x" not in text:
        raise ConfigurationError(f"{name} is {text}, expected two numbers")
    return tuple(map(int, text.split("x")))


def test_a_value_is_read_from_text_once_and_refused_by_its_option() -> None:
    framed: list[FrameOptions] = []
    frame = Command("frame", FrameOptions, framed.append)
    app = typer.Typer()
    app.command()(as_typer(frame))
    assert "4x3." in CliRunner().invoke(app, ["--help"]).stdout
    assert CliRunner().invoke(app, ["--size", "4x3", "--inner", "2x1"]).exit_code == 0
    refused = CliRunner().invoke(app, ["--size", "4x3", "--inner", "2"]).exception
    assert isinstance(refused, ConfigurationError) and str(refused) == "inner is 2, expected two numbers"
    function = as_plain(frame, module="somewhere")
    annotations = {name: one.annotation for name, one in inspect.signature(function).parameters.items()}
    assert annotations == {"size": str, "inner": Optional[str]}  # noqa: UP045
    function(size="4x3", inner="2x1")
    function(size=(4, 3), inner=(2, 1))  # as a program gives it
    assert framed == [FrameOptions(size=(4, 3), inner=(2, 1))] * 3
