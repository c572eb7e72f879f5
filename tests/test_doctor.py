"""The compatibility matrix, and versions read without importing what they are of."""

import importlib.metadata
import os
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
OLD, NEW = ("0.14.0", "0.15.3", "0.16.1"), ("0.17.1", "0.18.2", "0.19.2")
SUPPORTED = {(None, megatron) for megatron in OLD + NEW} | {
    ("2.5.3", "0.14.0"),
    ("2.6.2", "0.15.3"),
    ("2.6.2", "0.16.1"),
    ("2.7.3", "0.15.3"),
    ("2.7.3", "0.16.1"),
}


@every(
    python=["3.10.14", "3.11.7", "3.12.4", "3.13.0"],
    nemo=["1.23.0", "2.4.1", "2.5.3", "2.6.2", "2.7.3", "2.8.0", "3.0.0", None],
    megatron=["0.12.3", "0.13.1", "0.14.0", "0.15.3", "0.16.1", *NEW, "0.20.0", "1.0.0", None],
)
def test_matrix(python: str, nemo: str | None, megatron: str | None):
    verdict = judge(COMPLETE | {"python": python, "nemo-toolkit": nemo, "megatron-core": megatron})
    pythons = ("3.12",) if megatron in NEW else ("3.11", "3.12")
    assert verdict.supported == (python[:4] in pythons and (nemo, megatron) in SUPPORTED)
    assert verdict.sentence.startswith("Supported" if verdict.supported else "Not supported: ")
    assert verdict.sentence.endswith(".") and "\n" not in verdict.sentence


@every(
    ("change", "words"),
    [
        ({"python": "3.10.14"}, ["Python is 3.10.14", "3.11 or 3.12"]),
        ({"torch": None}, ["torch is absent", "2.6"]),
        ({"torch": "2.5.1"}, ["torch is 2.5.1", "2.6"]),
        ({"megatron-core": None}, ["megatron-core is absent", "0.14, 0.15, 0.16, 0.17, 0.18 or 0.19"]),
        ({"megatron-core": "0.17.1", "nemo-toolkit": None}, ["Python is 3.11.7, expected 3.12", "0.17.1 needs"]),
        ({"megatron-core": "0.18.2", "python": "3.12.1"}, ["made for megatron-core 0.15 or 0.16", "Bridge"]),
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


BRIDGE = {"python": "3.12.1", "torch": "2.13.0", "megatron-core": "0.19.2", "megatron-bridge": "0.6.2"}


def test_megatron_bridge_needs_its_own_megatron_core():
    found = judge(BRIDGE).sentence
    assert found.startswith(
        "Supported: megatron-bridge 0.6.2 with megatron-core 0.19.2 (nvcr.io/nvidia/nemo:26.08)"
    )
    older = judge(BRIDGE | {"megatron-core": "0.18.2", "megatron-bridge": "0.5.0"})
    words = ("plain Megatron-Core", "nemo:26.06", "not with Megatron-Bridge", "expected 0.6 with 0.19")
    assert older.supported and [word for word in words if word not in older.sentence] == []


@every("container", doctor.CONTAINERS, ids=lambda container: container.name)
def test_what_a_container_has_is_recognised_by_its_name(container: doctor.Container):
    pair = {"megatron-core": f"{container.megatron}.0", "python": "3.12.3"}
    if container.nemo:
        found = judge(COMPLETE | pair | {"nemo-toolkit": f"{container.nemo}.0", "megatron-bridge": "0.1.0"})
    else:
        found = judge(BRIDGE | pair | {"megatron-bridge": f"{container.bridge}.0"})
    assert found.supported and f"(nvcr.io/nvidia/nemo:{container.name})" in found.sentence


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


def test_a_commit_of_the_checkout_around_it_is_no_part_of_a_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    package = tmp_path / "megatron" / "core"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    text = "import os\n__version__ = '0.19.2' + ('' if int(os.getenv('NO_VCS_VERSION', '0')) else '+abc1234')"
    (package / "package_info.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv("NO_VCS_VERSION", raising=False)
    monkeypatch.delitem(sys.modules, "megatron.core", raising=False)
    monkeypatch.delitem(sys.modules, "megatron", raising=False)
    assert installed()["megatron-core"] == "0.19.2"
    assert "NO_VCS_VERSION" not in os.environ


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
    with pytest.raises(
        ConfigurationError, match=r"^megatron-bridge is absent .* expected 0\.6 with 0\.19\.$"
    ):
        require_supported(bridge=True)
    having(**{name.replace("-", "_"): version for name, version in BRIDGE.items()}, nemo_toolkit=None)
    require_supported(bridge=True)
    having(megatron_core="0.13.1")
    with pytest.raises(
        ConfigurationError, match=r"megatron-core is 0\.13\.1, expected 0\.14, .* or 0\.19\.$"
    ):
        require_supported()
