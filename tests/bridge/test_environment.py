"""The environment is the one that constraints-bridge.txt pins: nothing of Transformer Engine, nothing that is not pinned."""

import sysconfig
from importlib import metadata
from importlib.util import find_spec

from tests.docs.pages import ROOT

LINES = (ROOT / "constraints-bridge.txt").read_text().splitlines()
PINS = dict(line.split("==") for line in LINES if line and not line.startswith("#"))
TOOLS = {"pip", "nemo-skymoe"}


def canonical(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")


def test_what_is_installed_is_what_is_pinned():
    # Once another test has loaded setuptools, what it brings along is on the path too.
    there = metadata.distributions(path=[sysconfig.get_path("purelib")])
    installed = {canonical(found.name): found.version.partition("+")[0] for found in there}
    pins = {canonical(name): version for name, version in PINS.items()}
    assert {name: installed[name] for name in installed.keys() - TOOLS} == pins


def test_transformer_engine_is_absent():
    """A fake of it would change what Megatron-Core finds."""
    assert find_spec("transformer_engine") is None
