"""What the pages name is there: pages, anchors, files, names in them, recipes, options."""

import ast
import re
from dataclasses import fields
from functools import cache

from nemo_skymoe.experiments import catalogue
from nemo_skymoe.moe.layer import SkyworkTransformerConfig
from nemo_skymoe.recipes.registry import RECIPES
from tests.cases import every
from tests.docs.pages import PAGES, ROOT, Page

FOLDERS = "nemo_skymoe|recipes|conf|patches|benchmarks|slurm|tests|docs"
PATH = re.compile(rf"(?:{FOLDERS})/[\w./-]*(?:::\w+)?")
OPTIONS = {field.name for field in fields(SkyworkTransformerConfig)}
RECIPE_NAMES = {recipe.name for recipe in RECIPES}
BY_NAME = {page.name: page for page in PAGES}
every_page = every("page", PAGES, ids=lambda page: page.name)


@cache
def names_in(file: str) -> set[str]:
    """Functions, classes, methods and variables of a Python file."""
    names = set()
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


def is_there(reference: str) -> bool:
    path, _, name = reference.partition("::")
    return (ROOT / path).exists() and (not name or name in names_in(path))


@every_page
def test_links_lead_somewhere(page: Page) -> None:
    for link in page.links:
        target, _, anchor = link.partition("#")
        if "://" not in link:
            file = page.path.parent / target if target else page.path
            assert file.exists(), link
            assert not anchor or anchor in BY_NAME[file.stem].anchors, link


@every_page
def test_files_and_names_exist(page: Page) -> None:
    for code in page.code:
        if PATH.fullmatch(code):
            assert is_there(code), code


@every_page
def test_fences_are_of_a_kind_that_is_tested(page: Page) -> None:
    kinds = re.findall(r"^\s*(?:```|~~~)(.+)$", page.text, re.MULTILINE)
    assert set(kinds) <= {"bash", "python", "text", "yaml", "{toctree}", "{eval-rst}"}
    assert len(page.blocks) == sum(not kind.startswith("{") for kind in kinds)


@every_page
def test_what_python_imports_from_here_exists(page: Page) -> None:
    """In examples that cannot run here, too."""
    for block in page.blocks:
        for node in ast.walk(ast.parse(block.text if block.language == "python" else "")):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("nemo_skymoe."):
                path = str(node.module).replace(".", "/")
                for name in node.names:
                    module = ROOT / path / name.name
                    found = module.is_dir() or module.with_suffix(".py").exists()
                    assert found or is_there(f"{path}.py::{name.name}")


@every_page
def test_options_exist(page: Page) -> None:
    for code in page.code:
        for option in re.findall(r"\b(?:moe|edp)_\w+", code):
            assert option in OPTIONS, code


@every_page
def test_recipes_exist(page: Page) -> None:
    of_bridge = {*catalogue.RECIPES, *catalogue.SHORT_NAMES}
    for code in page.code:
        if re.fullmatch(r"skywork_[a-z0-9_]+", code):
            assert code in RECIPE_NAMES | of_bridge, code


def test_every_recipe_has_its_row() -> None:
    table = "\n".join(line for line in BY_NAME["pretrain"].prose.splitlines() if line.startswith("|"))
    assert set(re.findall(r"`(skywork_\w+)`", table)) == RECIPE_NAMES


def test_the_index_has_every_page() -> None:
    index = BY_NAME["index"]
    (tree,) = re.findall(r"^```\{toctree\}\n:hidden:\n\n(.*?)^```", index.text, re.MULTILINE | re.DOTALL)
    others = sorted(set(BY_NAME) - {"index"})
    assert sorted(tree.split()) == others
    assert sorted(link.removesuffix(".md") for link in index.links if link.endswith(".md")) == others


def rows() -> list[list[str]]:
    """Of the table of the report's parts."""
    table = BY_NAME["paper"].prose.partition("|---|")[2].partition("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[1:]]


PARTS = [f"sec. {n}" for n in ("2.1", "2.2", "3", "3.1, 3.3", "4.1", "4.2", "5")]
PARTS += [f"eq. {n}" for n in ("(1), (2)", "(4)", "(6)", "(7), (8), (9)")]
PARTS += [f"Fig. {n}" for n in (1, 2, 3, 4, 6, 7, 8)] + ["Table 1", "Table 2"]
PARTS += [f"app. {n}" for n in ("B.1", "B.2", "B.3", "C.1", "C.2")]


def test_the_table_has_the_reports_parts() -> None:
    named = ", ".join(row[0] for row in rows())
    assert [part for part in PARTS if part not in named] == []


@every("row", rows(), ids=lambda row: row[0])
def test_every_entry_of_the_table_exists(row: list[str]) -> None:
    code, recipe, proof = (re.findall(r"`([^`]+)`", cell) for cell in row[2:])
    assert code and proof
    assert all(PATH.fullmatch(entry) and is_there(entry) for entry in code + proof), row
    assert set(recipe) <= RECIPE_NAMES | OPTIONS | {"mixture", "phases"}, row
