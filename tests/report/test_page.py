import base64
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.report.curves import Curve, LossCurve
from nemo_skymoe.report.page import Table, Text, write_report

RUN = LossCurve("run", Curve(np.arange(50), np.linspace(3.0, 2.0, 50)))
SIMILARITY = {"moe/expert_similarity_layer_1": Curve.from_points({0: 1.0, 9: 0.5})}
VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Collects tags and text, and fails on a tag that is not closed where it should be."""

    def __init__(self, html: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, list[str]] = {}
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open:
            self.text.setdefault(self.open[-1], []).append(data)


def write(output: Path, title="T", lead="L", losses=(RUN,), telemetry=SIMILARITY, tables=()) -> Page:
    return Page(write_report(output, title, lead, losses, telemetry, tables).read_text("utf-8"))


def test_pngs_are_embedded_and_lie_beside_the_page(tmp_path):
    page = write(tmp_path / "new" / "report")
    sources = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    embedded = [base64.b64decode(source.removeprefix("data:image/png;base64,")) for source in sources]
    beside = [
        (tmp_path / f"new/report/figures/{name}.png").read_bytes() for name in ("losses", "expert_similarity")
    ]
    assert embedded == beside
    assert all(png.startswith(b"\x89PNG") for png in embedded)
    assert all(attributes["alt"] for tag, attributes in page.tags if tag == "img")


def test_nothing_is_loaded_from_elsewhere(tmp_path):
    page = write(tmp_path, tables=[Table("t", ["a"], [[1]]), Text("x", "y")])
    links = [
        (tag, v)
        for tag, attrs in page.tags
        for k, v in attrs.items()
        if k in ("src", "href", "srcset", "data")
    ]
    outside = [(tag, value) for tag, value in links if not value.startswith("data:")]
    assert outside == [("a", "https://arxiv.org/abs/2406.06563")]
    assert not {"script", "link", "iframe", "object", "base"} & {tag for tag, _ in page.tags}
    assert not re.search(r"@import|url\(", "".join(page.text["style"]))


def test_whatever_is_given_is_escaped(tmp_path):
    evil = """<script>alert("1")</script> & 'x' $title ${lead}"""
    tables = [Table(evil, [evil], [[evil]], evil), Text(evil, evil)]
    page = write(tmp_path, title=evil, lead=evil, losses=[LossCurve(evil, RUN.train)], tables=tables)
    assert "script" not in {tag for tag, _ in page.tags}
    for tag in ("title", "h1", "p", "h2", "th", "td", "pre"):
        assert evil in page.text[tag], tag


def test_order_is_tables_then_figures_then_texts(tmp_path):
    write(tmp_path, lead="One.\n\nTwo.", tables=[Text("config", "k: v"), Table("mesh", ["a"], [["b"]])])
    html = (tmp_path / "report.html").read_text("utf-8")
    places = [
        html.index(s)
        for s in ("<p>One.</p>\n<p>Two.</p>", "<h2>mesh</h2>", "<figure", "<h2>config</h2>", "<footer")
    ]
    assert places == sorted(places)


def test_numbers_are_formatted_and_set_to_the_right(tmp_path):
    rows = [
        ["a", 1234567, 0.000123456, True],
        ["b", None, 3.0, False],
        ["c", np.int64(3), np.float32(2e6), True],
    ]
    page = write(tmp_path, tables=[Table("t", ["name", "count", "value", "flag"], rows)])
    cells = [attributes.get("class") for tag, attributes in page.tags if tag == "td"]
    assert cells == [None, "number", "number", None] * 3
    assert [t for t in page.text["td"] if t.strip()] == [
        *("a", "1,234,567", "0.0001235", "True"),
        *("b", "3.000", "False"),
        *("c", "3", "2,000,000", "True"),
    ]


def test_the_page_names_the_figures_it_leaves_out_and_drops_old_ones(tmp_path):
    write(tmp_path)
    assert sorted(path.name for path in tmp_path.glob("figures/*")) == ["expert_similarity.png", "losses.png"]
    page = write(tmp_path, telemetry={})
    assert sorted(path.name for path in tmp_path.glob("figures/*")) == ["losses.png"]
    (sentence,) = [text for text in page.text["p"] if text.startswith("Left out")]
    assert "expert similarity" in sentence and "losses" not in sentence


def test_bad_input_writes_nothing(tmp_path):
    with pytest.raises(ConfigurationError, match=r"a row of 'mesh' has 1 cells; expected 2"):
        write(tmp_path / "a", tables=[Table("mesh", ["x", "y"], [[1]])])
    assert not (tmp_path / "a").exists()
    (tmp_path / "file").write_text("kept")
    with pytest.raises(ConfigurationError, match="file; expected a directory"):
        write(tmp_path / "file" / "below")
    assert (tmp_path / "file").read_text() == "kept"


def test_an_interrupted_write_leaves_the_old_page(tmp_path, monkeypatch):
    write(tmp_path, lead="old")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def full(source, target):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        write(tmp_path, lead="new")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
