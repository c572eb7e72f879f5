"""The compatibility matrix, and versions read without importing what they are of."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_skymoe import doctor
from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.doctor import installed, judge, require_supported
from tests.cases import every

COMPLETE = {
    "python": "3.11.7",
    "torch": "2.8.0+cu128",
    "nemo-toolkit": "2.7.3",
    "nemo_run": "0.11.1",
    "megatron-core": "0.15.3",
    "lightning": "2.4.0",
    "pytorch-lightning": "2.6.6",
    "transformer-engine": None,
    "apex": None,
    "hydra-core": "1.3.2",
    "cuda": None,
}
SUPPORTED = {(None, megatron) for megatron in ("0.14.0", "0.15.3", "0.16.1")} | {
    ("2.5.3", "0.14.0"),
    ("2.6.2", "0.15.3"),
    ("2.6.2", "0.16.1"),
    ("2.7.3", "0.15.3"),
    ("2.7.3", "0.16.1"),
}


@every(
    python=["3.10.14", "3.11.7", "3.12.4", "3.13.0"],
    nemo=["1.23.0", "2.4.1", "2.5.3", "2.6.2", "2.7.3", "2.8.0", "3.0.0", None],
    megatron=["0.12.3", "0.13.1", "0.14.0", "0.15.3", "0.16.1", "0.17.0", "1.0.0", None],
)
def test_matrix(python: str, nemo: str | None, megatron: str | None):
    verdict = judge(COMPLETE | {"python": python, "nemo-toolkit": nemo, "megatron-core": megatron})
    assert verdict.supported == (python[:4] in ("3.11", "3.12") and (nemo, megatron) in SUPPORTED)
    assert verdict.sentence.startswith("Supported" if verdict.supported else "Not supported: ")
    assert verdict.sentence.endswith(".") and "\n" not in verdict.sentence


@every(
    ("change", "words"),
    [
        ({"python": "3.10.14"}, ["Python is 3.10.14", "3.11 or 3.12"]),
        ({"torch": None}, ["torch is absent", "2.6"]),
        ({"torch": "2.5.1"}, ["torch is 2.5.1", "2.6"]),
        ({"megatron-core": None}, ["megatron-core is absent", "0.14, 0.15 or 0.16"]),
        ({"megatron-core": "0.14.0"}, ["has no ProcessGroupCollection", "expected megatron-core 0.15 or 0.16"]),
        ({"nemo-toolkit": "2.5.3"}, ["has no ModelCommProcessGroups", "expected megatron-core 0.14."]),
        ({"nemo-toolkit": "2.6.2", "megatron-core": "0.14.0"}, ["has no ProcessGroupCollection"]),
        ({"nemo-toolkit": "3.0.0"}, ["nemo-toolkit is 3.0.0", "2.5, 2.6 or 2.7", "nemo.collections.llm"]),
        ({"nemo_run": None, "lightning": None}, ["nemo-toolkit 2.7.3 imports nemo_run and lightning, absent"]),
        ({"hydra-core": None}, ["imports hydra-core, absent"]),
    ],
)  # fmt: skip
def test_refusal_says_what_is_wrong_and_what_was_expected(change: dict[str, str | None], words: list[str]):
    verdict = judge(COMPLETE | change)
    assert not verdict.supported
    assert [word for word in words if word not in verdict.sentence] == []


@every("torch", ["2.6.0", "2.10.1", "2.13.0+cpu", "3.0.0"])
def test_torch_from_2_6_on(torch: str):
    assert judge(COMPLETE | {"torch": torch}).supported


@every("megatron", ["0.15.0rc7", "0.15.0.dev20251101", "0.15.3+abc"])
def test_builds_of_a_release_count_as_it(megatron: str):
    assert judge(COMPLETE | {"megatron-core": megatron}).supported


def test_only_the_tested_pair_is_called_tested():
    assert "the pair that the tests run with" in judge(COMPLETE).sentence
    container = judge(COMPLETE | {"nemo-toolkit": "2.6.0", "megatron-core": "0.15.0rc4"})
    words = ("nemo-toolkit 2.6.0 with megatron-core 0.15.0rc4", "2.6.2 with 0.15.3 was seen", "on a CPU")
    assert [word for word in words if word not in container.sentence] == []


def test_packages_without_nemo_need_none_of_what_nemo_needs():
    core = {"python": "3.12.1", "torch": "2.6.0", "megatron-core": "0.16.1"}
    assert judge(core).sentence.startswith("Supported for plain Megatron-Core use")


def test_installed_agrees_with_the_metadata():
    """In this environment nothing shadows an installed package, so both sources must say the same."""

    def recorded(name: str) -> str | None:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return None

    found = installed()
    found["torch"] = (found["torch"] or "").partition("+")[0]  # CUDA wheels leave it out of their metadata
    assert {name: found[name] for name in doctor.PACKAGES} == {
        name: (recorded(name) or "").partition("+")[0] or None for name in doctor.PACKAGES
    }
    assert found["python"] == sys.version.split()[0]


def test_installed_imports_none_of_them():
    code = "import sys; from nemo_skymoe.doctor import require_supported; require_supported();"
    code += "assert not {'torch', 'nemo', 'lightning', 'megatron.core', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_source_tree_on_the_path_counts_before_the_installed_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    package = tmp_path / "megatron" / "core"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise AssertionError('imported')")
    (package / "package_info.py").write_text("MAJOR, MINOR = 0, 16\n__version__ = f'{MAJOR}.{MINOR}.1'")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "megatron.core", raising=False)
    monkeypatch.delitem(sys.modules, "megatron", raising=False)
    assert installed()["megatron-core"] == "0.16.1"


def test_require_supported(monkeypatch: pytest.MonkeyPatch):
    def having(**change: str | None) -> None:
        versions = COMPLETE | {name.replace("_", "-"): version for name, version in change.items()}
        monkeypatch.setattr(doctor, "installed", lambda: versions)

    having()
    require_supported(nemo=True)
    having(nemo_toolkit=None)
    require_supported()
    with pytest.raises(ConfigurationError, match=r"^nemo-toolkit is absent, expected 2\.5, 2\.6 or 2\.7\.$"):
        require_supported(nemo=True)
    having(megatron_core="0.13.1")
    with pytest.raises(
        ConfigurationError, match=r"megatron-core is 0\.13\.1, expected 0\.14, 0\.15 or 0\.16\.$"
    ):
        require_supported()
