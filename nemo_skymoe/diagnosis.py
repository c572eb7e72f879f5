"""Gather and print what `skymoe doctor` shows: versions with remarks, the verdict, and the patches that apply here."""

import ast
import json
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import resources

from nemo_skymoe import doctor, gpus
from nemo_skymoe.doctor import Verdict


@dataclass(frozen=True)
class Row:
    """One line of the table. `version` is None if the package is absent."""

    name: str
    version: str | None
    remark: str


@dataclass(frozen=True)
class Patch:
    """A substitution of `nemo_skymoe.patches`, and the upstream code that makes it necessary."""

    name: str
    reason: str


@dataclass(frozen=True)
class Diagnosis:
    """Everything that `skymoe doctor` shows."""

    rows: list[Row]
    verdict: Verdict
    patches: list[Patch]


def diagnose() -> Diagnosis:
    """Examine this installation without importing what it examines."""
    versions = doctor.installed()
    devices = gpus.visible() if versions["cuda"] else []
    return Diagnosis(_rows(versions, devices), doctor.judge(versions), patches(versions, devices))


def patches(versions: Mapping[str, str | None], devices: Sequence[str]) -> list[Patch]:
    """List what `nemo_skymoe.patches` substitutes here, from its sources and without importing them.

    A module there either lists functions as `SUBSTITUTIONS`, whose docstrings give the reason, or is one patch itself,
    whose docstring says "Upstream: ...".
    """
    found: list[Patch] = []
    for file in sorted(resources.files("nemo_skymoe.patches").iterdir(), key=lambda file: file.name):
        module, _, suffix = file.name.rpartition(".")
        if suffix == "py" and _applies(module, versions, devices):
            found += _declared(module, ast.parse(file.read_text("utf-8")))
    return found


def _applies(module: str, versions: Mapping[str, str | None], devices: Sequence[str]) -> bool:
    core = versions["megatron-core"] or ""
    te, nemo, bridge = (
        bool(versions[name]) for name in ("transformer-engine", "nemo-toolkit", "megatron-bridge")
    )
    single = {
        "executor_values": bool(versions["nemo_run"]),
        "router_without_te": not te and core.startswith(("0.14.", "0.15.", "0.16.")),
        "lora_without_te": nemo and not te,
        "bridge_without_te": bridge and not te,
        "bridge_lora_without_te": bridge and not te,
        "bridge_compiled_helpers": bridge,
        "context_parallel_aux_loss": core.startswith(("0.14.", "0.15.")),
        "expert_parallel_warning": core.startswith(("0.14.", "0.15.")),
        "unified_memory": not devices and core.startswith("0.15."),
        "optimizer_arguments": nemo and core.startswith("0.16."),
        "tensorstore_import": nemo and core.startswith("0.16."),
        "checked_context": nemo,
        "torchrun_executor": not devices and nemo,
    }
    # All others stand in for CUDA; those named after a front door do so there.
    door = {"nemo": nemo, "bridge": bridge}.get(module.partition("_")[0], True)
    return single.get(module, not devices and door)


def _declared(module: str, tree: ast.Module) -> list[Patch]:
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "SUBSTITUTIONS":
            names = [name.id for name in ast.walk(node.value) if isinstance(name, ast.Name)]
            return [
                Patch(f"{module}.{name}", _paragraph(functions[name])) for name in names if name in functions
            ]
    upstream = _paragraph(tree, after="Upstream: ")
    return [Patch(module, upstream)] if upstream else []


def _paragraph(documented: ast.Module | ast.FunctionDef, after: str = "") -> str:
    """Return the first paragraph of a docstring that begins with `after`, without it and on one line."""
    for paragraph in (ast.get_docstring(documented) or "").split("\n\n"):
        if paragraph.startswith(after):
            return " ".join(paragraph.removeprefix(after).split())
    return ""


def _rows(versions: Mapping[str, str | None], devices: Sequence[str]) -> list[Row]:
    cuda = versions["cuda"]
    names = ", ".join(f"{count} x {name}" for name, count in Counter(devices).items())
    return [
        Row("Python", versions["python"], ""),
        Row("operating system", f"{platform.system()} {platform.release()}", platform.machine()),
        *(Row(name, versions[name], _remark(name, versions)) for name in doctor.PACKAGES),
        Row("CUDA", cuda, names or ("no device" if cuda else "torch is built without it")),
    ]


def _remark(name: str, versions: Mapping[str, str | None]) -> str:
    if versions[name]:
        if name == "transformer-engine" and not versions["cuda"]:
            return "fails to load without CUDA, and NeMo with it: uninstall it"
        return ""
    return {
        "torch": "needed",
        "megatron-core": "needed",
        "nemo-toolkit": "for recipes and the demo",
        "megatron-bridge": "the other front door, without NeMo",
        "transformer-engine": "Megatron's local layers take its place",
        "apex": "optional",
    }.get(name, "NeMo needs it")


def show_json(diagnosis: Diagnosis) -> None:
    """Print a diagnosis for programs: its fields `rows`, `verdict` and `patches`."""
    print(json.dumps(asdict(diagnosis), indent=2))


def show(diagnosis: Diagnosis, reasons: bool = False) -> None:
    """Print a diagnosis for people, with the verdict last. With `reasons` it also says why each patch is needed."""
    from rich.console import Console
    from rich.table import Table

    versions = Table("", "version", "remark", box=None, pad_edge=False)
    for row in diagnosis.rows:
        versions.add_row(row.name, row.version or "absent", row.remark)
    console = Console(highlight=False, markup=False)
    console.print(versions)
    console.print(f"\nPatches that apply here: {len(diagnosis.patches) or 'none'}")
    if reasons:
        substitutions = Table.grid(padding=(0, 2))
        for patch in diagnosis.patches:
            substitutions.add_row(patch.name, patch.reason)
        console.print(substitutions)
    elif diagnosis.patches:
        console.print(", ".join(patch.name for patch in diagnosis.patches))
        console.print("(why: skymoe doctor --patches)")
    console.print(f"\n{diagnosis.verdict.sentence}")
