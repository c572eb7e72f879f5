"""Importing Megatron on a machine with the CUDA toolkit and without a GPU."""

import subprocess
import sys
import textwrap
from importlib.metadata import version

import pytest
import torch

from tests.waiting import HANG

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="the failure needs a machine without a GPU"),
    pytest.mark.skipif(not version("megatron-core").startswith("0.15."), reason="0.15 compiles at import"),
]

# A toolkit that is there, whatever this machine has, and what torch then does for Megatron.
SCRIPT = """
    import os
    os.environ.pop("TORCH_CUDA_ARCH_LIST", None)
    from torch.utils import cpp_extension
    cpp_extension.CUDA_HOME = {toolkit!r}
    if {patched}:
        from nemo_skymoe.patches import unified_memory
        assert unified_memory.apply() and not unified_memory.apply()
    import megatron.core.inference.unified_memory as built
    assert not built.has_unified_memory
"""


def import_megatron(toolkit: str, patched: bool) -> subprocess.CompletedProcess[str]:
    script = textwrap.dedent(SCRIPT.format(toolkit=toolkit, patched=patched))
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=HANG)


def test_the_import_ends_in_an_index_error(tmp_path):
    pytest.importorskip(
        "megatron.core.inference.unified_memory", reason="megatron-core 0.15 and 0.16 have it"
    )
    assert "IndexError" in import_megatron(str(tmp_path), patched=False).stderr


def test_cured(tmp_path):
    pytest.importorskip(
        "megatron.core.inference.unified_memory", reason="megatron-core 0.15 and 0.16 have it"
    )
    cured = import_megatron(str(tmp_path), patched=True)
    assert cured.returncode == 0, cured.stderr
