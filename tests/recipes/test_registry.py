"""The list of recipes: one table for the entry point, the tests and the README."""

from importlib.metadata import entry_points
from pathlib import Path

import pytest
from nemo.collections import llm
from nemo_run.cli.api import resolve_factory

from nemo_skymoe.recipes import registry
from tests.recipes.factories import factories

ROOT = Path(__file__).resolve().parents[2]


def test_the_entry_point_leads_to_every_factory() -> None:
    (entry,) = [point for point in entry_points(group="nemo_run.cli") if point.name == "skymoe"]
    entry.load()
    for command, factory in factories(registry.RECIPES).items():
        kind, name = command.split()
        assert resolve_factory(getattr(llm, kind), name) is factory


def test_the_table_has_every_factory_there_is() -> None:
    files = [file.read_text() for file in (ROOT / "recipes").glob("skywork_*.py")]
    written = sum(text.count("@run.cli.factory(target=") for text in files)
    assert written == len(factories(registry.RECIPES))


def test_the_list_in_the_readme_is_the_table() -> None:
    """If this fails: python -m nemo_skymoe.recipes.registry README.md"""
    text = (ROOT / "README.md").read_text()
    assert registry.with_list(text) == text


def test_a_file_without_markers_is_left_alone() -> None:
    with pytest.raises(ValueError, match="expected the markers"):
        registry.with_list("no list here")
    assert registry.with_list(f"a {registry.BEGIN} old {registry.END} b").count("| `skywork_moe_146b` |") == 1
