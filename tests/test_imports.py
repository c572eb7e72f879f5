"""The shape of the tree: who may import whom, what is light, and what every file owes its reader."""

import ast
import re
import subprocess
import sys
from collections.abc import Set
from pathlib import Path

from tests.cases import every
from tests.modules import MODULES, ROOT, imported, parsed, python_files

# One way: a module imports only from rooms that stand before its own. It belongs to the longest name that it begins with.
ORDER = (
    *("durable", "gpus", "output"),
    *("option_values", "unfit_options", "traffic", "dispatchers", "config"),
    *(
        "shell",
        "names",
        "typed",
        "folders",
        "quantities",
        "credentials",
        "ranks",
        "rotary_options",
        "architecture",
    ),
    *("patches", "moe", "pipeline"),
    # What the formats share, the formats, what is made of them, and the second path that checks the result.
    *(
        "checkpoint",
        "checkpoint.untrusted",
        "checkpoint.tensors",
        "checkpoint.hugging_face",
        "checkpoint.torch_dist",
        "checkpoint.upcycling",
    ),
    *(
        "checkpoint.job",
        "checkpoint.formats",
        "checkpoint.sources",
        "checkpoint.convert",
        "checkpoint.inspection",
        "checkpoint.verification",
    ),
    "data",
    "experiments",
    *("doctor", "diagnosis", "selfcheck", "report", "advice", "evaluation"),
    *(
        "nemo",
        "bridge",
        "megatron_lm",
        "recipes",
        "demo",
        "conf",
        "launch",
        "commands",
        "cli",
        "nemo_cli",
        "__main__",
    ),
)
# Siblings: what two of these share stands below both.
APART = {f"nemo_skymoe.checkpoint.{name}" for name in ("hugging_face", "torch_dist", "upcycling")}
# How the writers' work is checked: nothing here may share a mistake with them.
SECOND_PATH = ("bits", "comparison", "recomputed", "hugging_face_tensors", "megatron_tensors")
LAYERS = {"nemo_skymoe": -1} | {f"nemo_skymoe.{name}": height for height, name in enumerate(ORDER)}
# What must outlive NeMo, and what must work before it is installed.
BELOW_THE_DOORS = {f"nemo_skymoe.{name}" for name in ORDER[: ORDER.index("nemo")]}
WITHOUT_NEMO = BELOW_THE_DOORS - {"nemo_skymoe.patches"} | {"nemo_skymoe.bridge"}
WITHOUT_BRIDGE = BELOW_THE_DOORS - {"nemo_skymoe.patches"} | {"nemo_skymoe.nemo", "nemo_skymoe.recipes"}
DOORS = {"nemo_skymoe.nemo", "nemo_skymoe.bridge"}
NEMO = {"nemo", "nemo_run", "lightning", "pytorch_lightning", "fiddle"}
LIGHT = (
    "",
    *(".durable", *(f".durable.{file.stem}" for file in (ROOT / "nemo_skymoe/durable").glob("[a-z]*.py"))),
    ".gpus",
    ".output",
    ".config",
    ".option_values",
    ".unfit_options",
    ".traffic",
    ".dispatchers",
    ".quantities",
    ".architecture",
    ".ranks",
    ".pipeline.training",
    ".pipeline.texts",
    ".experiments",
    ".experiments.choices",
    ".experiments.runs",
    ".experiments.scales",
    ".experiments.dense_13b",
    ".experiments.moe_146b",
    ".experiments.figure_1",
    ".experiments.figure_3",
    ".experiments.figure_7",
    ".experiments.figure_8",
    ".experiments.demonstration",
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
PACKAGE = sorted(name for name in MODULES if name.partition(".")[0] == "nemo_skymoe")
every_module = every(module=PACKAGE)


def layer(module: str) -> tuple[str, int]:
    """The longest entry of LAYERS that `module` begins with, and its height."""
    name = module
    while name not in LAYERS or (name == "nemo_skymoe" and name != module):
        assert "." in name, f"{module} has no place in LAYERS: add it, in agreement with the design"
        name = name.rpartition(".")[0]
    return name, LAYERS[name]


def ours(names: Set[str]) -> set[str]:
    return {name for name in names if name.partition(".")[0] == "nemo_skymoe"}


def foreign(names: Set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names} - {"nemo_skymoe"}


@every_module
def test_imports_point_down(module: str):
    room, height = layer(module)
    below = [name for name in ours(imported(module)) if layer(name)[0] != room]
    assert [name for name in below if layer(name)[1] >= height] == []


def test_the_readme_states_the_order():
    """The line says that a module imports only from what stands left of it; every file and folder of the package is on it."""
    [line] = re.findall(r"^```\n([^`]* <- [^`]*)```$", (ROOT / "README.md").read_text(), re.MULTILINE)
    groups = [[name.strip() for name in group.split(",")] for group in line.split("<-")]
    height = {name: number for number, group in enumerate(groups) for name in group}
    assert height.keys() == {name.partition(".")[0] for name in ORDER} - {"__main__", "conf"}

    def place(module: str) -> str:
        return module.partition(".")[2].partition(".")[0]

    sideways = [
        f"{module} imports {name}"
        for module in PACKAGE
        for name in ours(imported(module))
        if place(module) != place(name)
        and height.get(place(name), -1) >= height.get(place(module), len(groups))
    ]
    assert sideways == []


def test_linked_folders_are_read(tmp_path: Path):
    assert {"nemo_skymoe.recipes.registry", "nemo_skymoe.patches.cpu_adam"} <= MODULES.keys()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "module.py").touch()
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "package")
    assert [*python_files(tmp_path / "package")] == [tmp_path / "package" / "link" / "module.py"]


@every_module
def test_siblings_do_not_know_each_other(module: str):
    room = layer(module)[0]
    if room in APART:
        assert APART & {layer(name)[0] for name in ours(imported(module))} <= {room}


def test_the_second_path_shares_no_code_with_the_first():
    allowed = ("nemo_skymoe.architecture", "nemo_skymoe.config", "nemo_skymoe.durable.errors")
    for name in SECOND_PATH:
        shared = ours(imported(f"nemo_skymoe.checkpoint.verification.{name}")) - {*allowed}
        assert [module for module in shared if ".verification." not in module] == []


@every_module
def test_only_nemo_and_what_is_above_it_imports_nemo(module: str):
    if layer(module)[0] in WITHOUT_NEMO:
        assert foreign(imported(module)) & NEMO == set()


@every_module
def test_nothing_below_bridge_imports_megatron_bridge(module: str):
    if layer(module)[0] in WITHOUT_BRIDGE:
        assert [name for name in imported(module) if f"{name}.".startswith("megatron.bridge.")] == []


@every_module
def test_the_doors_do_not_know_each_other(module: str):
    """What the front doors of NeMo and of Megatron-Bridge share stands below both."""
    room = layer(module)[0]
    if room in DOORS:
        assert DOORS & {layer(name)[0] for name in ours(imported(module))} <= {room}


@every_module
def test_patches_are_imported_only_where_they_are_applied(module: str):
    patches = {name for name in ours(imported(module)) if name.startswith("nemo_skymoe.patches")}
    if layer(module)[0] == "nemo_skymoe.patches":
        below = {"nemo_skymoe.config", "nemo_skymoe.shell", "nemo_skymoe.gpus"}
        assert ours(imported(module)) - patches <= below
        return
    source = MODULES[module].read_text()
    assert [name for name in patches if f"{name.rpartition('.')[2]}.apply(" not in source] == []
    if layer(module)[0] in WITHOUT_NEMO:
        assert [name for name in patches if foreign(imported(name)) & NEMO] == []


@every(name=LIGHT)
def test_light_modules_load_only_the_standard_library_and_each_other(name: str):
    on_import = imported(f"nemo_skymoe{name}", "when it is imported")
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


@every(module=[name for name in PACKAGE if name.startswith("nemo_skymoe.recipes")])
def test_recipes_keep_their_annotations(module: str):
    """NeMo-Run evaluates the annotations of factories; as strings they take the whole entry point down."""
    futures = [
        node
        for node in ast.walk(parsed(module))
        if isinstance(node, ast.ImportFrom) and node.module == "__future__"
    ]
    assert [alias.name for node in futures for alias in node.names if alias.name == "annotations"] == []


def test_no_file_is_longer_than_400_lines():
    lengths = {
        str(file.relative_to(ROOT)): len(file.read_text().splitlines())
        for folder in ("nemo_skymoe", "benchmarks", "tests", "docs")
        for file in python_files(ROOT / folder)
    }
    assert {name: length for name, length in lengths.items() if length > 400} == {}


@every_module
def test_what_is_public_is_documented(module: str):
    tree = parsed(module)
    definitions = [
        node for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    ]
    bare = [node.name for node in definitions if not ast.get_docstring(node)]
    assert ast.get_docstring(tree), f"{module} has no docstring"
    assert [name for name in bare if not name.startswith("_")] == []
