"""The API reference documents names that exist and have a docstring; `make docs` builds it."""

import ast
import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from nemo_skymoe import __version__
from tests.docs.pages import PAGES, ROOT

(PAGE,) = (page for page in PAGES if page.name == "api")
NAMES = re.findall(r"^\.\. auto(?:class|function|data|exception):: ([\w.]+)", PAGE.text, re.MULTILINE)
ANY_DIRECTIVE = re.compile(r"^\.\. \w+::", re.MULTILINE)


def documented(name: str) -> bool:
    """Whether a name is defined where the page says, with a docstring behind it or in it; nothing is imported."""
    module, _, last = name.rpartition(".")
    path = ROOT / module.replace(".", "/")
    tree = ast.parse((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text())
    for node, after in zip(tree.body, [*tree.body[1:], None], strict=True):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == last:
            return ast.get_docstring(node) is not None
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == last:
            return isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
    return last in {
        name for node in ast.walk(tree) if isinstance(node, ast.List) for name in ast.literal_eval(node)
    }


def test_every_name_is_public_and_documented() -> None:
    assert len(NAMES) == len(set(NAMES)) == len(ANY_DIRECTIVE.findall(PAGE.text))
    assert all(not part.startswith("_") for name in NAMES for part in name.split("."))
    assert [name for name in NAMES if not documented(name)] == []


def test_the_errors_of_the_package_are_all_there() -> None:
    errors = ast.parse((ROOT / "nemo_skymoe/durable/errors.py").read_text()).body
    listed = {name.rpartition(".")[2] for name in NAMES}
    assert {node.name for node in errors if isinstance(node, ast.ClassDef)} <= listed


def test_the_version_is_the_same_everywhere() -> None:
    patterns = {"pyproject.toml": r'^version = "(.+)"$', "CITATION.cff": r"^version: (.+)$"}
    for file, pattern in patterns.items():
        assert re.findall(pattern, (ROOT / file).read_text(), re.MULTILINE) == [__version__], file


def sphinx_configuration() -> ModuleType:
    spec = importlib.util.spec_from_file_location("conf", Path(ROOT) / "docs/conf.py")
    assert spec and spec.loader
    spec.loader.exec_module(found := importlib.util.module_from_spec(spec))
    return found


@pytest.mark.parametrize("what, expected", [("attribute", ": lambda: a scale"), ("class", "lambda: a scale")])
def test_words_before_a_colon_are_no_type(what: str, expected: str) -> None:
    """Napoleon takes them for one, unless the line begins with a colon."""
    lines = ["lambda: a scale"]
    sphinx_configuration()._without_type(None, what, "", None, None, lines)
    assert lines == [expected]
