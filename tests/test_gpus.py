"""GPUs are counted without torch, hidden from tests and demo, and asked about by no import."""

import os
import subprocess
import sys

from nemo_skymoe import gpus
from tests.modules import MODULES

COUNTED = """
from nemo_skymoe import gpus
found = gpus.visible()
import torch
assert not torch.cuda.is_initialized()
assert found == [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())], found
assert gpus.hide() == found and gpus.visible() == []
"""

ASKED = """
import importlib, sys
import torch
asked = []
for name in ("is_available", "device_count", "current_device", "set_device", "get_device_name", "get_device_capability"):
    def asking(*given, name=name, real=getattr(torch.cuda, name), **more):
        caller = sys._getframe(1).f_globals["__name__"]
        if caller.partition(".")[0] == "nemo_skymoe":
            asked.append(f"{caller} asks {name}")
        return real(*given, **more)
    setattr(torch.cuda, name, asking)
for module in sys.argv[1:]:
    importlib.import_module(module)
from nemo_skymoe import gpus
gpus.in_use()
assert asked.pop() == "nemo_skymoe.gpus asks is_available"
sys.exit("\\n".join(asked) or 0)
"""


def python(*words: str, **environment: str) -> str:
    own = {name: value for name, value in os.environ.items() if name != gpus.VISIBLE}
    run = subprocess.run(
        [sys.executable, "-c", *words], env=own | environment, capture_output=True, text=True
    )
    return "" if run.returncode == 0 else run.stderr


def test_those_that_are_counted_are_those_that_torch_counts() -> None:
    assert python(COUNTED) == ""


def test_no_import_asks_for_cuda() -> None:
    """With everything but what needs Megatron-Bridge, whose modules tests/bridge imports in the same way."""
    modules = [name for name in MODULES if name.startswith("nemo_skymoe") and "bridge" not in name]
    assert len(modules) > 200
    assert python(ASKED, *(name for name in modules if not name.endswith("__main__"))) == ""
