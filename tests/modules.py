"""The modules of this repository, found through linked folders too, and what each of them imports."""

import ast
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parents[1]
When = Literal["anywhere", "while it runs", "when it is imported"]


def python_files(folder: Path) -> Iterator[Path]:
    """Every Python file below a folder and below the folders that links in it lead to; none is entered twice."""
    entered: set[str] = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(set(folders) - {"__pycache__"})
        if (real := os.path.realpath(place)) in entered:
            folders.clear()
            continue
        entered.add(real)
        yield from (Path(place, name) for name in sorted(names) if name.endswith(".py"))


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {
    module_name(file): file for top in ("nemo_skymoe", "benchmarks") for file in python_files(ROOT / top)
}
"""Every module by its name. `recipes`, `patches` and `conf` are links in the package and have their names from there."""


@cache
def parsed(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text())


@cache
def imported(module: str, when: When = "anywhere") -> frozenset[str]:
    """What a module imports, ours and others'.

    Args:
        when: "anywhere" in the file; "while it runs", which leaves out what only a type checker reads; or "when it is
            imported", which also leaves out what stands in functions.
    """
    names: set[str] = set()
    for node in _nodes(parsed(module), when):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {_origin(module, node, alias.name) for alias in node.names}
    return frozenset(names)


def _nodes(node: ast.AST, when: When) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if when == "when it is imported" and isinstance(
            child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
        ):
            continue
        if when != "anywhere" and isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from _nodes(child, when)


def _origin(module: str, node: ast.ImportFrom, name: str) -> str:
    """What `from X import name` loads: the submodule X.name where it is one of ours, else X."""
    source = node.module or ""
    if node.level:
        is_package = MODULES[module].name == "__init__.py"
        parents = module.split(".")[: len(module.split(".")) - node.level + is_package]
        source = ".".join([*parents, *([source] if source else [])])
    return f"{source}.{name}" if f"{source}.{name}" in MODULES else source
