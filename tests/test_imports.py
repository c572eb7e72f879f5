"""The shape of the tree: who may import whom, what is light, and what every file owes its reader."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.cases import every

ROOT = Path(__file__).resolve().parents[1]
# One way: a module imports only from rooms that stand before its own. It belongs to the longest name that it begins with.
ORDER = (
    "durable",
    *("option_values", "traffic", "dispatchers", "config"),
    *("shell", "names", "folders", "quantities", "credentials", "ranks", "architecture"),
    *("patches", "moe", "pipeline"),
    # What the formats share, the formats, what is made of them, and the second path that checks the result.
    *(
        "checkpoint",
        "checkpoint.untrusted",
        "checkpoint.hugging_face",
        "checkpoint.torch_dist",
        "checkpoint.upcycling",
    ),
    *("checkpoint.convert", "checkpoint.inspection", "checkpoint.verification"),
    "data",
    *("doctor", "diagnosis", "report", "advice", "evaluation"),
    *("nemo", "recipes", "demo", "launch", "commands", "cli", "nemo_cli", "__main__"),
)
LAYERS = {"nemo_skymoe": -1} | {f"nemo_skymoe.{name}": height for height, name in enumerate(ORDER)}
# What must outlive NeMo, and what must work before it is installed.
WITHOUT_NEMO = {f"nemo_skymoe.{name}" for name in ORDER[: ORDER.index("nemo")]} - {"nemo_skymoe.patches"}
NEMO = {"nemo", "nemo_run", "lightning", "pytorch_lightning", "fiddle"}
LIGHT = (
    "",
    ".durable",
    ".durable.errors",
    ".config",
    ".option_values",
    ".traffic",
    ".dispatchers",
    ".quantities",
    ".architecture",
    ".ranks",
    ".pipeline.training",
    ".pipeline.texts",
    ".doctor",
    ".diagnosis",
    ".patches.unified_memory",
    ".commands.advice",
    ".commands.checkpoint",
    ".commands.data",
    ".commands.installation",
    ".commands.report",
    ".commands.values",
    ".commands.evaluation",
    ".commands.checkpoint_options",
    ".commands.launch",
    ".commands.pipeline",
    ".commands.front_ends",
    ".cli",
    ".__main__",
)
HEAVY = {"torch", "megatron", "numpy", "matplotlib", "rich"} | NEMO


def python_files(*folders: str) -> Iterator[Path]:
    for folder in folders:
        for place, _, names in os.walk(ROOT / folder):  # does not follow links: nemo_skymoe/recipes is one
            yield from (Path(place, name) for name in names if name.endswith(".py"))


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "nemo_skymoe" else ("nemo_skymoe", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(file): file for file in python_files("nemo_skymoe", "recipes", "patches")}
every_module = every(module=sorted(MODULES))


def layer(module: str) -> tuple[str, int]:
    """The longest entry of LAYERS that `module` begins with, and its height."""
    name = module
    while name not in LAYERS or (name == "nemo_skymoe" and name != module):
        assert "." in name, f"{module} has no place in LAYERS: add it, in agreement with the design"
        name = name.rpartition(".")[0]
    return name, LAYERS[name]


@cache
def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


@cache
def imported(module: str, *, on_import: bool = False) -> set[str]:
    """Modules that `module` imports anywhere, or only those that load when it is imported itself."""
    tree = parsed(MODULES[module])
    nodes = at_module_level(tree.body) if on_import else ast.walk(tree)
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {origin(module, node, alias.name) for alias in node.names}
    return names


def at_module_level(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    for node in body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        for inner in ("body", "orelse", "finalbody"):
            if isinstance(node, ast.If | ast.Try | ast.With):
                yield from at_module_level(getattr(node, inner, []))
        for handler in getattr(node, "handlers", []):
            yield from at_module_level(handler.body)


def origin(module: str, node: ast.ImportFrom, name: str) -> str:
    """What `from X import name` loads: the submodule X.name where it is one of ours, else X."""
    source = node.module or ""
    if node.level:
        is_package = MODULES[module].name == "__init__.py"
        parents = module.split(".")[: len(module.split(".")) - node.level + is_package]
        source = ".".join([*parents, *([source] if source else [])])
    return f"{source}.{name}" if f"{source}.{name}" in MODULES else source


def ours(names: set[str]) -> set[str]:
    return {name for name in names if name.partition(".")[0] == "nemo_skymoe"}


def foreign(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names} - {"nemo_skymoe"}


@every_module
def test_imports_point_down(module: str):
    room, height = layer(module)
    below = [name for name in ours(imported(module)) if layer(name)[0] != room]
    assert [name for name in below if layer(name)[1] >= height] == []


@every_module
def test_only_nemo_and_what_is_above_it_imports_nemo(module: str):
    if layer(module)[0] in WITHOUT_NEMO:
        assert foreign(imported(module)) & NEMO == set()


@every_module
def test_patches_are_imported_only_where_they_are_applied(module: str):
    patches = {name for name in ours(imported(module)) if name.startswith("nemo_skymoe.patches")}
    if layer(module)[0] == "nemo_skymoe.patches":
        below = {"nemo_skymoe.config", "nemo_skymoe.shell"}
        assert ours(imported(module)) - patches <= below
        return
    source = MODULES[module].read_text()
    assert [name for name in patches if f"{name.rpartition('.')[2]}.apply(" not in source] == []
    if layer(module)[0] in WITHOUT_NEMO:
        assert [name for name in patches if foreign(imported(name)) & NEMO] == []


@every(name=LIGHT)
def test_light_modules_load_only_the_standard_library_and_each_other(name: str):
    on_import = imported(f"nemo_skymoe{name}", on_import=True)
    allowed = {"typer"} if name == ".cli" or name.startswith(".commands") else set()
    assert foreign(on_import) - sys.stdlib_module_names <= allowed
    assert ours(on_import) <= {f"nemo_skymoe{light}" for light in LIGHT}


def test_light_modules_load_nothing_heavy():
    names = [f"nemo_skymoe{name}" for name in LIGHT if name != ".__main__"]
    code = f"""
import importlib, sys
for name in {names}:
    importlib.import_module(name)
    assert not {HEAVY} & sys.modules.keys(), name
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_the_package_loads_nothing_else():
    code = "import sys; before = {*sys.modules}; import nemo_skymoe; print(*sys.modules.keys() - before)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.split() == ["nemo_skymoe"]


@pytest.mark.parametrize("file", sorted(python_files("recipes")), ids=lambda file: file.name)
def test_recipes_keep_their_annotations(file: Path):
    """NeMo-Run evaluates the annotations of factories; as strings they take the whole entry point down."""
    futures = [
        n
        for n in ast.walk(ast.parse(file.read_text()))
        if isinstance(n, ast.ImportFrom) and n.module == "__future__"
    ]
    assert [alias.name for node in futures for alias in node.names if alias.name == "annotations"] == []


def test_no_file_is_longer_than_400_lines():
    lengths = {
        str(file.relative_to(ROOT)): len(file.read_text().splitlines())
        for file in python_files("nemo_skymoe", "recipes", "patches", "conf", "benchmarks", "tests")
    }
    assert {name: length for name, length in lengths.items() if length > 400} == {}


@every_module
def test_what_is_public_is_documented(module: str):
    tree = parsed(MODULES[module])
    definitions = [
        node for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    ]
    bare = [node.name for node in definitions if not ast.get_docstring(node)]
    assert ast.get_docstring(tree), f"{module} has no docstring"
    assert [name for name in bare if not name.startswith("_")] == []
