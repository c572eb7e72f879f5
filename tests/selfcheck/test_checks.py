"""The self-check on two gloo ranks, and what it says of something that is wrong."""

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from nemo_skymoe import gpus
from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.ranks import run_ranks
from nemo_skymoe.selfcheck import dispatch, parts, run, toy
from nemo_skymoe.selfcheck.dispatch import DISPATCHERS
from nemo_skymoe.selfcheck.finding import Finding
from tests.waiting import HANG


def test_the_command_says_what_it_finds(tmp_path: Path) -> None:
    """Every check on this machine, with a line for each of its claims; the file says what the terminal says."""
    command = [sys.executable, "-m", "nemo_skymoe", "doctor", "--ranks", "2"]
    path = f"{Path(__file__).parents[2]}:{os.environ.get('PYTHONPATH', '')}"
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=4 * HANG,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    text = (tmp_path / "skymoe-doctor.txt").read_text()
    assert text in done.stdout and "2 ranks on the CPU, over gloo" in text
    assert "WRONG" not in text and "Nothing is wrong." in text
    for claim in (
        "tables    ok",
        "loss of a toy MoE in float64",
        "kernels forward",
        *(f"dispatcher {name} in float64" for name in DISPATCHERS),
        *(f"dispatcher {name}, unfused" for name in DISPATCHERS),
        "saved and read by 2 ranks: 0 differ",
    ):
        assert claim in text, claim


def test_a_gradient_that_differs_is_wrong() -> None:
    cpu = {"loss": torch.ones(()).double(), "a": torch.ones(3).double(), "b": torch.ones(3).double()}
    device = cpu | {"b": cpu["b"] * (1 + 1e-9)}
    loss, gradients = toy.compare(cpu, device)
    assert (loss.verdict, gradients.verdict) == ("ok", "WRONG") and "the worst of b" in gradients.what


def test_a_dispatcher_that_differs_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that weights its outputs a little otherwise."""
    right = dispatch._pass

    def wrong(layer: object, split: bool) -> dict[str, torch.Tensor]:
        found = right(layer, split)
        if type(layer.token_dispatcher).__name__ == "AllToAllTokenDispatcher":  # type: ignore[attr-defined]
            found["output"] = found["output"] * (1 + 1e-8)
        return found

    monkeypatch.setattr(dispatch, "_pass", wrong)
    monkeypatch.setattr(dispatch, "_permutations", lambda: ())
    verdicts = {finding.what.split()[1]: finding for finding in run_ranks(dispatch.check, 2, timeout=HANG)[0]}
    assert {name for name, finding in verdicts.items() if finding.verdict == "WRONG"} == {"alltoall"}
    assert "the worst of output" in verdicts["alltoall"].what


def test_a_check_that_ends_badly_is_wrong_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails() -> list[Finding]:
        return run_ranks(torch.zeros(2).view, 1, 3, timeout=HANG)[0]

    monkeypatch.setattr(
        run, "_checks", lambda *_: {"first": fails, "second": lambda: [Finding("ok", "that")]}
    )
    said: list[str] = []
    assert not run.run(gpu=False, ranks=1, output=tmp_path / "found.txt", say=said.append)
    assert "rank 0 of 1 failed" in said[3] and "invalid for input of size 2" in said[3]
    assert said[4] == "second    ok       that" and said[5] == "\n1 of 2 lines are WRONG"


def test_ranks_are_those_that_the_gpus_allow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    refused = {
        "--gpu needs a GPU": (True, None, 0),
        "--ranks is 4, expected at most 2": (True, 4, 2),
        "--ranks is 3, expected 1, 2, 4, 8, 16": (False, 3, 0),
    }
    for message, (gpu, ranks, found) in refused.items():
        monkeypatch.setattr(gpus, "visible", lambda found=found: ["NVIDIA A800"] * found)
        with pytest.raises(ConfigurationError, match=message):
            run.run(gpu=gpu, ranks=ranks, output=tmp_path / "found.txt")
    assert not (tmp_path / "found.txt").exists()
    assert [run._ranks(True, None, found) for found in (1, 6, 8, 72)] == [1, 4, 8, 16]


def test_a_part_that_is_broken_is_not_called_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins: one that cannot be loaded, one without the function, and one that is whole."""

    class Broken(ModuleType):
        def __getattr__(self, name: str) -> object:
            raise OSError(f"undefined symbol for {name}")

    triton = ModuleType("triton")
    monkeypatch.setitem(sys.modules, "triton", triton)
    monkeypatch.setitem(sys.modules, "amp_C", Broken("amp_C"))
    monkeypatch.setattr(parts, "PARTS", {"triton:jit": "off", "amp_C:l2norm": "slow", "no_module:x": "none"})
    assert [finding.verdict for finding in parts.check()] == ["absent", "WRONG", "absent"]
    triton.jit = object()  # type: ignore[attr-defined]
    assert parts.check()[0].verdict == "ok"
