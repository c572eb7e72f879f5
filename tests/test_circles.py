"""No module imports another that needs it: what can be read alone can be understood alone."""

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("nemo_skymoe", "recipes", "patches", "benchmarks")
# These stand under another name in the package as well.
LINKED = {"recipes": "nemo_skymoe.recipes", "patches": "nemo_skymoe.patches"}


def modules() -> dict[str, Path]:
    found = {}
    for folder in FOLDERS:
        for file in sorted((ROOT / folder).rglob("*.py")):
            if any(part.is_symlink() for part in file.parents if part.is_relative_to(ROOT)):
                continue
            parts = file.relative_to(ROOT).with_suffix("").parts
            parts = (*LINKED.get(parts[0], parts[0]).split("."), *parts[1:])
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imports(module: str, file: Path, known: Mapping[str, Path]) -> Iterator[str]:
    """The modules of ours that a file imports anywhere in it, but for what only a type checker sees."""
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                package = module if file.name == "__init__.py" else module.rpartition(".")[0]
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                source = ".".join([*parents, *([source] if source else [])])
            for alias in node.names:
                name = f"{source}.{alias.name}"
                if name in known or source in known:
                    yield name if name in known else source


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Every group of modules that lead to each other (Tarjan's strongly connected components)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in graph[node]:
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            group = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(group) > 1 or node in graph[node]:
                found.append(sorted(group))

    for node in graph:
        if node not in index:
            visit(node)
    return found


def test_a_circle_is_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
    assert circles({"a": {"b"}, "b": set(), "c": {"c"}}) == [["c"]]


def test_no_imports_go_round_in_a_circle() -> None:
    known = modules()
    assert {
        "nemo_skymoe.recipes.registry",
        "nemo_skymoe.patches.cpu_adam",
        "benchmarks.paper.runs",
    } <= known.keys()
    graph = {name: {*imports(name, file, known)} - {name} for name, file in known.items()}
    assert circles(graph) == []
