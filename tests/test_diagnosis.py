"""`skymoe doctor`: its table, its JSON, its exit code, its patches."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nemo_skymoe import diagnosis, doctor
from nemo_skymoe.ranks import run_ranks

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
        "Python", "operating system", "torch", "nemo-toolkit", "nemo_run", "megatron-core", "lightning",
        "pytorch-lightning", "transformer-engine", "apex", "hydra-core", "CUDA",
    ]  # fmt: skip
    words = " ".join(table.stdout.split())
    for row in found["rows"]:
        assert f"{row['name']} {row['version'] or 'absent'}" in words
    assert found["verdict"]["supported"] and found["verdict"]["sentence"] in words
    assert [patch["name"] for patch in found["patches"] if patch["name"] not in words] == []


def test_answers_within_4_seconds():
    durations = []
    for _ in range(3):
        start = time.monotonic()
        skymoe_doctor()
        durations.append(time.monotonic() - start)
    assert min(durations) < 4.0


def test_unsupported_combination_exits_with_1(tmp_path: Path):
    core = tmp_path / "megatron" / "core"
    core.mkdir(parents=True)
    (core / "__init__.py").touch()
    (core / "package_info.py").write_text("__version__ = '0.16.1'")
    answer = skymoe_doctor(path=tmp_path)
    assert answer.returncode == 1
    assert "imports but does not train" in " ".join(answer.stdout.split())
    assert json.loads(skymoe_doctor("--json", path=tmp_path).stdout)["verdict"]["supported"] is False


def test_with_cuda_only_a_missing_transformer_engine_needs_a_patch():
    gpu = ["NVIDIA A800-SXM4-80GB"]
    assert diagnosis.patches({**NO_NEMO, "transformer-engine": "2.9"}, gpu) == []
    assert names(diagnosis.patches({**NO_NEMO, "transformer-engine": None}, gpu)) == ["router_without_te"]


def names(patches: list[diagnosis.Patch]) -> list[str]:
    return sorted(patch.name for patch in patches)


def test_listed_patches_are_those_applied():
    """Against what the patches themselves report, in a process of their own."""

    def apply() -> list[str]:
        from megatron.core.transformer.moe import moe_utils

        from nemo_skymoe.patches import cpu_runtime, router_without_te

        moe_utils.__dict__.pop("te_general_gemm", None)  # this process may be the child of a patched one
        alone = ["router_without_te"] if router_without_te.apply() else []
        return alone + cpu_runtime.apply()

    [applied] = run_ranks(apply, 1, env={"CUDA_VISIBLE_DEVICES": ""})
    listed = diagnosis.patches(NO_NEMO, [])
    assert len(applied) > 1 and names(listed) == sorted(applied)
    assert all(patch.reason for patch in listed)


@pytest.mark.long
def test_listed_patches_are_those_applied_with_nemo():
    def apply() -> list[str]:
        from nemo_skymoe.patches import nemo_cpu

        return nemo_cpu.apply()

    [applied] = run_ranks(apply, 1, env={"CUDA_VISIBLE_DEVICES": ""})
    listed = names(diagnosis.patches(doctor.installed(), []))
    assert [name for name in listed if name != "router_without_te"] == sorted(applied)


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
    monkeypatch.setattr(diagnosis, "cuda_devices", lambda: ["NVIDIA A800"] * 8)
    found = diagnosis.diagnose()
    assert (found.rows[-1].version, found.rows[-1].remark) == ("12.8", "8 x NVIDIA A800")
    assert names(found.patches) == ["router_without_te"]


def test_devices_are_those_torch_sees():
    import torch

    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    assert diagnosis.cuda_devices() == names
