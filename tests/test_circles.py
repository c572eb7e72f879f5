"""No module imports another that needs it: what can be read alone can be understood alone."""

from collections.abc import Mapping

from tests.modules import MODULES, imported


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
    assert {"nemo_skymoe.recipes.registry", "benchmarks.paper.runs"} <= MODULES.keys()
    graph = {name: {*imported(name, "while it runs")} & MODULES.keys() - {name} for name in MODULES}
    assert circles(graph) == []
