"""Write one self-contained HTML page with the tables and figures of one or more runs."""

from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from numbers import Integral, Real
from pathlib import Path
from string import Template

import nemo_skymoe
from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.durable.files import write_small
from nemo_skymoe.report.curves import Curve, LossCurve
from nemo_skymoe.report.figures import FIGURE_TITLES, Picture, draw_figures

PIXEL_DENSITY = 1.5  # pixels of a PNG to one of the page, alike for all so that their letters are of one size


@dataclass(frozen=True)
class Table:
    """A table of plain values. Numbers are formatted and set to the right, and None is an empty cell.

    Every row has a cell for each column. `note` is a sentence below the table.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    note: str = ""


@dataclass(frozen=True)
class Text:
    """Preformatted text, which is shown as it is and comes after the figures."""

    title: str
    body: str


def write_report(
    output: Path,
    title: str,
    lead: str,
    losses: Sequence[LossCurve],
    telemetry: Mapping[str, Curve],
    tables: Sequence[Table | Text],
) -> Path:
    """Write `output`/report.html, which needs no other file, and its figures as `output`/figures/*.png.

    Args:
        output: Directory, made where it does not exist; files of an earlier report are replaced.
        title: Heading of the page.
        lead: Plain text below the heading; an empty line begins a new paragraph.
        losses: Runs to compare on one axis.
        telemetry: Curves by tag; those named `moe/<metric>_layer_<number>` are drawn.
        tables: Tables come before the figures, texts after them, each in the order given.

    Returns:
        The path of report.html.

    Raises:
        ConfigurationError: `output` cannot be a directory, or a row does not fit its table's columns.
    """
    output = Path(output)
    html_tables = [_table(table) for table in tables if isinstance(table, Table)]
    texts = [_text(text) for text in tables if isinstance(text, Text)]
    pictures = draw_figures(losses, telemetry)
    page = Template(files("nemo_skymoe.report").joinpath("template.html").read_text("utf-8")).substitute(
        title=escape(title),
        lead="\n".join(
            f"<p>{escape(paragraph)}</p>" for paragraph in lead.split("\n\n") if paragraph.strip()
        ),
        tables="\n".join(html_tables),
        figures="\n".join([*(_figure(i, p) for i, p in enumerate(pictures, 1)), _left_out(pictures)]),
        texts="\n".join(texts),
        version=escape(nemo_skymoe.__version__),
    )
    folder = output / "figures"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ConfigurationError(
            f"output: {output} is or lies below a file; expected a directory."
        ) from error
    for picture in pictures:
        write_small(folder / f"{picture.name}.png", picture.png)
    for name in FIGURE_TITLES.keys() - {picture.name for picture in pictures}:
        (folder / f"{name}.png").unlink(missing_ok=True)
    write_small(output / "report.html", page.encode())
    return output / "report.html"


def _table(table: Table) -> str:
    for row in table.rows:
        if len(row) != len(table.columns):
            raise ConfigurationError(
                f"tables: a row of {table.title!r} has {len(row)} cells; expected {len(table.columns)}."
            )
    numeric = [
        all(_is_number(row[i]) or row[i] is None for row in table.rows) for i in range(len(table.columns))
    ]
    head = "".join(_cell("th", name, number) for name, number in zip(table.columns, numeric, strict=True))
    body = "\n".join(
        "<tr>" + "".join(_cell("td", v, number) for v, number in zip(row, numeric, strict=True)) + "</tr>"
        for row in table.rows
    )
    note = f'\n<p class="note">{escape(table.note)}</p>' if table.note else ""
    return (
        f"<section>\n<h2>{escape(table.title)}</h2>\n<div class='wide'><table>\n"
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>{note}\n</section>"
    )


def _cell(tag: str, value: object, number: bool) -> str:
    return f"<{tag}{' class=number' if number else ''}>{escape(_format(value))}</{tag}>"


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _format(value: object) -> str:
    """Format integers with their thousands marked, and other numbers with four significant digits."""
    if value is None:
        return ""
    if isinstance(value, Integral) and not isinstance(value, bool):
        return f"{int(value):,}"
    if isinstance(value, Real) and not isinstance(value, bool):
        return f"{float(value):,.0f}" if abs(float(value)) >= 1e4 else f"{float(value):#.4g}"
    return str(value)


def _text(text: Text) -> str:
    return f"<section>\n<h2>{escape(text.title)}</h2>\n<pre>{escape(text.body)}</pre>\n</section>"


def _figure(number: int, picture: Picture) -> str:
    source = b64encode(picture.png).decode()
    width = round(int.from_bytes(picture.png[16:20]) / PIXEL_DENSITY)
    return (
        f'<figure id="{picture.name}">\n<div class="wide plot">'
        f'<img src="data:image/png;base64,{source}" width="{width}" alt="{escape(picture.title)}"></div>\n'
        f"<figcaption><strong>Figure {number}. {escape(picture.title)}.</strong> {escape(picture.caption)}"
        "</figcaption>\n</figure>"
    )


def _left_out(pictures: Sequence[Picture]) -> str:
    drawn = {picture.name for picture in pictures}
    absent = [title[0].lower() + title[1:] for name, title in FIGURE_TITLES.items() if name not in drawn]
    if not absent:
        return ""
    return (
        f'<p class="note">Left out, because the logs hold no values to draw: {escape("; ".join(absent))}.</p>'
    )
