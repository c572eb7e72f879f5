"""`skymoe doctor`: its table, its JSON, its exit code, its patches."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_skymoe import diagnosis, doctor, gpus
from nemo_skymoe.ranks import run_ranks
from tests.cases import every

SKYMOE = str(Path(sys.executable).with_name("skymoe"))
NO_NEMO = {**doctor.installed(), "nemo-toolkit": None}


def skymoe_doctor(*options: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    env = os.environ | ({"PYTHONPATH": str(path)} if path else {})
    return subprocess.run([SKYMOE, "doctor", *options], capture_output=True, text=True, env=env)


def test_json_and_table_hold_the_same():
    as_json, table = skymoe_doctor("--json"), skymoe_doctor()
    assert as_json.returncode == table.returncode == 0
    found = json.loads(as_json.stdout)
    assert [row["name"] for row in found["rows"]] == [
        "Python", "operating system", "torch", "nemo-toolkit", "nemo_run", "megatron-core",
        "megatron-bridge", "lightning", "pytorch-lightning", "transformer-engine", "apex", "hydra-core", "CUDA",
    ]  # fmt: skip
    words = " ".join(table.stdout.split())
    for row in found["rows"]:
        assert f"{row['name']} {row['version'] or 'absent'}" in words
    assert found["verdict"]["supported"] and found["verdict"]["sentence"] in words
    assert [patch["name"] for patch in found["patches"] if patch["name"][:20] not in words] == []


def test_imports_nothing_that_it_examines():
    code = """
import sys
from nemo_skymoe import cli
try:
    cli.app(["doctor", "--json"])
except SystemExit as exit:
    assert not exit.code
examined = {"torch", "megatron.core", "nemo", "nemo_run", "lightning", "pytorch_lightning", "hydra", "numpy"}
assert not examined & set(sys.modules), examined & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_unsupported_combination_exits_with_1(tmp_path: Path):
    core = tmp_path / "megatron" / "core"
    core.mkdir(parents=True)
    (core / "__init__.py").touch()
    (core / "package_info.py").write_text("__version__ = '0.14.0'")
    answer = skymoe_doctor(path=tmp_path)
    assert answer.returncode == 1
    assert "has no ProcessGroupCollection" in " ".join(answer.stdout.split())
    assert json.loads(skymoe_doctor("--json", path=tmp_path).stdout)["verdict"]["supported"] is False


@every(
    ("engine", "core", "expected"),
    [
        (
            "2.9",
            "0.16.1",
            ["checked_context", "executor_values", "optimizer_arguments", "tensorstore_import"],
        ),
        (
            "2.9",
            "0.15.3",
            ["checked_context", "context_parallel_aux_loss", "executor_values", "expert_parallel_warning"],
        ),
        (
            None,
            "0.16.1",
            [
                "checked_context",
                "executor_values",
                "lora_without_te",
                "optimizer_arguments",
                "router_without_te",
                "tensorstore_import",
            ],
        ),
    ],
)
def test_with_cuda_nothing_stands_in_for_it(engine: str | None, core: str, expected: list[str]):
    versions = {**doctor.installed(), "transformer-engine": engine, "megatron-core": core}
    assert names(diagnosis.patches(versions, ["NVIDIA A800-SXM4-80GB"])) == expected


def names(patches: list[diagnosis.Patch]) -> list[str]:
    return sorted(patch.name for patch in patches)


def substitutions(patches: list[diagnosis.Patch]) -> list[str]:
    """Names of those that stand in for CUDA; a single patch has no dot in its name."""
    return [name for name in names(patches) if "." in name]


def test_listed_patches_are_those_applied():
    """Against what the patches themselves report, in a process of their own."""

    def apply() -> list[str]:
        from nemo_skymoe.patches import cpu_runtime

        return cpu_runtime.apply()

    [applied] = run_ranks(apply, 1, env={"CUDA_VISIBLE_DEVICES": ""})
    listed = diagnosis.patches(NO_NEMO, [])
    assert len(applied) > 1 and substitutions(listed) == sorted(applied)
    assert all(patch.reason for patch in listed)


@pytest.mark.long
def test_listed_patches_are_those_applied_with_nemo():
    def apply() -> list[str]:
        from nemo_skymoe.patches import nemo_cpu

        return nemo_cpu.apply()

    [applied] = run_ranks(apply, 1, env={"CUDA_VISIBLE_DEVICES": ""})
    assert substitutions(diagnosis.patches(doctor.installed(), [])) == sorted(applied)


def test_remarks(monkeypatch: pytest.MonkeyPatch):
    versions = {name: None for name in (*doctor.PACKAGES, "cuda")} | {
        "python": "3.11.7",
        "transformer-engine": "2.9",
    }
    monkeypatch.setattr(doctor, "installed", lambda: versions)
    rows = {row.name: row for row in diagnosis.diagnose().rows}
    assert "uninstall" in rows["transformer-engine"].remark
    assert rows["torch"].remark == "needed"
    assert rows["CUDA"].version is None


def test_devices_are_counted_by_kind(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor, "installed", lambda: NO_NEMO | {"cuda": "12.8"})
    monkeypatch.setattr(gpus, "visible", lambda: ["NVIDIA A800"] * 8)
    found = diagnosis.diagnose()
    assert (found.rows[-1].version, found.rows[-1].remark) == ("12.8", "8 x NVIDIA A800")
    assert substitutions(found.patches) == []


def test_the_verdict_comes_last_and_reasons_on_demand(capsys: pytest.CaptureFixture[str]) -> None:
    patch = diagnosis.Patch("some_patch", "What breaks without it.")
    found = diagnosis.Diagnosis([], doctor.Verdict(True, "Supported: this."), [patch])
    diagnosis.show(found)
    short = capsys.readouterr().out
    assert short.rstrip().endswith("Supported: this.") and "some_patch" in short
    assert patch.reason not in short and "--patches" in short
    diagnosis.show(found, reasons=True)
    assert patch.reason in capsys.readouterr().out
