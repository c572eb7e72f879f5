"""Find which versions are installed, and judge whether they work together.

Nothing heavy is imported: versions are read from the files that an import would find.
"""

import os
import platform
import re
import runpy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from nemo_skymoe.config import ConfigurationError

PYTHON = ("3.11", "3.12")
OLDEST_TORCH = "2.6"
MEGATRON = ("0.14", "0.15", "0.16", "0.17", "0.18", "0.19")
"""The minor versions of megatron-core with which `make versions` runs the tests of everything below NeMo and Bridge."""
ONLY_WITH_312 = ("0.17", "0.18", "0.19")
TESTED = ("2.7.3", "0.15.3")
PAIRS = (("2.5.3", "0.14.0"), ("2.6.2", "0.15.3"), ("2.6.2", "0.16.1"), TESTED, ("2.7.3", "0.16.1"))
"""The pairs of NeMo and megatron-core that `make compat` imports, dry-runs, trains and resumes on a CPU."""
BRIDGE = ("0.6.2", "0.19.2")
"""The pair of Megatron-Bridge and megatron-core that `make test-bridge` runs with."""
PACKAGES = (
    "torch",
    "nemo-toolkit",
    "nemo_run",
    "megatron-core",
    "megatron-bridge",
    "lightning",
    "pytorch-lightning",
    "transformer-engine",
    "apex",
    "hydra-core",
)
_GROUPS = {"2.5": "ModelCommProcessGroups", "2.6": "ProcessGroupCollection", "2.7": "ProcessGroupCollection"}
"""The class that a NeMo imports, by its version. 0.15 of megatron-core replaced the first by the second."""
_NO_COMMITS = "NO_VCS_VERSION"
_NEMO_IMPORTS = ("nemo_run", "lightning", "hydra-core")
_VERSION_FILES = {
    "torch": ("torch", "version.py"),
    "nemo-toolkit": ("nemo", "package_info.py"),
    "megatron-core": ("megatron.core", "package_info.py"),
}


@dataclass(frozen=True)
class Container:
    """One of NVIDIA's containers, and what its release notes say is in it. All of them have Python 3.12."""

    name: str
    megatron: str
    nemo: str | None = None
    bridge: str | None = None

    def has(self, versions: Mapping[str, str | None]) -> bool:
        """Say whether an installation has the same minor versions of NeMo or Megatron-Bridge and of megatron-core."""
        front_end = ("nemo-toolkit", self.nemo) if self.nemo is not None else ("megatron-bridge", self.bridge)
        pairs = (("megatron-core", self.megatron), front_end)
        return all(_minor(versions.get(name)) == _minor(version) for name, version in pairs)


CONTAINERS = (
    Container("25.09", "0.14", nemo="2.5"),
    Container("25.11", "0.15", nemo="2.6"),
    Container("26.02", "0.16", nemo="2.7"),
    Container("26.04", "0.17", bridge="0.4"),
    Container("26.06", "0.18", bridge="0.5"),
    Container("26.08", "0.19", bridge="0.6"),
)
"""nvcr.io/nvidia/nemo by tag. Those up to 26.02 also have a Megatron-Bridge, which is older than what this supports."""


@dataclass(frozen=True)
class Verdict:
    """A judgement on a combination of versions, and the sentence that gives the reason."""

    supported: bool
    sentence: str


def require_supported(*, nemo: bool = False, bridge: bool = False) -> None:
    """Refuse an installation that cannot work, before anything is built.

    Args:
        nemo: Whether the caller needs NeMo.
        bridge: Whether the caller needs Megatron-Bridge. Without either, Megatron-Core alone is enough.

    Raises:
        ConfigurationError: A dependency is missing, too old, or does not work with another.
    """
    versions = installed()
    verdict = judge(versions)
    if not verdict.supported:
        raise ConfigurationError(verdict.sentence)
    if nemo and versions["nemo-toolkit"] is None:
        raise ConfigurationError(f"nemo-toolkit is absent, expected {_either(_GROUPS)}.")
    if bridge and (problem := _bridge_problem(versions)):
        raise ConfigurationError(f"{problem}.")


def judge(versions: Mapping[str, str | None]) -> Verdict:
    """Judge a combination of versions.

    Args:
        versions: Versions by the names that `installed` gives. None or a missing name means an absent package.
    """
    nemo, megatron = versions.get("nemo-toolkit"), versions.get("megatron-core")
    if problem := _core_problem(versions) or (nemo and _nemo_problem(versions, nemo)):
        return Verdict(False, f"Not supported: {problem}.")
    container = next((f" (nvcr.io/nvidia/nemo:{one.name})" for one in CONTAINERS if one.has(versions)), "")
    if nemo is None:
        return Verdict(True, _without_nemo(versions, container))
    pair = f"nemo-toolkit {nemo} with megatron-core {megatron}{container}"
    [tried] = [found for found in PAIRS if _minors(*found) == _minors(nemo, megatron)]
    if tried == TESTED:
        return Verdict(True, f"Supported: {pair}, the pair that the tests run with.")
    seen = "this pair" if tried == (nemo, megatron) else " with ".join(tried)
    return Verdict(
        True,
        f"Supported: {pair}; {seen} was seen to train and resume on a CPU (benchmarks/compat.md), all tests run"
        f" with {' and '.join(TESTED)}.",
    )


def _without_nemo(versions: Mapping[str, str | None], container: str) -> str:
    core, bridge = f"megatron-core {versions.get('megatron-core')}", versions.get("megatron-bridge")
    if bridge is None:
        return f"Supported for plain Megatron-Core use: {core} without NeMo."
    if problem := _bridge_problem(versions):
        return (
            f"Supported for plain Megatron-Core use: {core}{container}; not with Megatron-Bridge: {problem}."
        )
    return (
        f"Supported: megatron-bridge {bridge} with {core}{container}; the tests of Megatron-Bridge run with"
        f" {' and '.join(BRIDGE)}."
    )


def _bridge_problem(versions: Mapping[str, str | None]) -> str | None:
    bridge, megatron = versions.get("megatron-bridge"), versions.get("megatron-core")
    if _minors(bridge, megatron) == _minors(*BRIDGE):
        return None
    return (
        f"megatron-bridge is {bridge or 'absent'} with megatron-core {megatron}, expected"
        f" {_minor(BRIDGE[0])} with {_minor(BRIDGE[1])}"
    )


def _core_problem(versions: Mapping[str, str | None]) -> str | None:
    python, torch, megatron = (versions.get(name) for name in ("python", "torch", "megatron-core"))
    if _minor(python) not in PYTHON:
        return f"Python is {python}, expected {_either(PYTHON)}"
    if _numbers(torch) < _numbers(OLDEST_TORCH):
        return f"torch is {torch or 'absent'}, expected {OLDEST_TORCH} or later"
    if _minor(megatron) not in MEGATRON:
        return f"megatron-core is {megatron or 'absent'}, expected {_either(MEGATRON)}"
    if _minor(megatron) in ONLY_WITH_312 and _minor(python) != "3.12":
        return f"Python is {python}, expected 3.12, which megatron-core {megatron} needs"
    return None


def _nemo_problem(versions: Mapping[str, str | None], nemo: str) -> str | None:
    megatron = versions.get("megatron-core")
    if _minor(nemo) not in _GROUPS:
        removed = " (3.0 removed nemo.collections.llm)" if _numbers(nemo) >= (3, 0) else ""
        return f"nemo-toolkit is {nemo}, expected {_either(_GROUPS)}{removed}"
    needed = [core for core in MEGATRON if (_minor(nemo), core) in {_minors(*pair) for pair in PAIRS}]
    if _minor(megatron) in ONLY_WITH_312:
        return (
            f"nemo-toolkit {nemo} has the last LLM collection of NeMo, which was made for megatron-core"
            f" {_either(needed)}, not {megatron}; expected one of these, or Megatron-Bridge in NeMo's place"
        )
    if _minor(megatron) not in needed:
        lack = f"megatron-core {megatron} has no {_GROUPS[_minor(nemo)]}"
        return f"{lack}, which nemo-toolkit {nemo} imports; expected megatron-core {_either(needed)}"
    missing = [name for name in _NEMO_IMPORTS if versions.get(name) is None]
    return f"nemo-toolkit {nemo} imports {' and '.join(missing)}, absent here" if missing else None


def installed() -> dict[str, str | None]:
    """Return the versions of "python", of `PACKAGES` and of torch's CUDA ("cuda"), each None if absent."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    versions |= {name: _version(name) for name in PACKAGES}
    return versions | {"cuda": _constants("torch").get("cuda")}


def _version(name: str) -> str | None:
    # First what would be imported: a source tree on PYTHONPATH has no metadata, or shadows what has.
    if version := _constants(name).get("__version__"):
        return version
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _constants(name: str) -> dict[str, str | None]:
    """Return what the version file of `name` defines. These files import nothing of their package."""
    if name not in _VERSION_FILES:
        return {}
    module, file = _VERSION_FILES[name]
    try:
        spec = find_spec(module)
    except ModuleNotFoundError:
        return {}
    for location in (spec and spec.submodule_search_locations) or ():
        if (path := Path(location, file)).exists():
            with _without_commits():
                return runpy.run_path(str(path))
    return {}


@contextmanager
def _without_commits() -> Iterator[None]:
    # From 0.18 on megatron-core adds the commit of whatever checkout it is installed in to its version.
    before = os.environ.get(_NO_COMMITS)
    os.environ[_NO_COMMITS] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_NO_COMMITS]
        else:
            os.environ[_NO_COMMITS] = before


def _numbers(version: str | None) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version or "")[:2])


def _minor(version: str | None) -> str:
    return ".".join(map(str, _numbers(version)))


def _minors(nemo: str | None, megatron: str | None) -> tuple[str, str]:
    return _minor(nemo), _minor(megatron)


def _either(versions: Iterable[str]) -> str:
    *most, last = versions
    return f"{', '.join(most)} or {last}" if most else last
