"""`import megatron.core` where torch is a CUDA build and the CUDA toolkit is there, but no GPU: a login node.

Upstream: megatron/core/inference/unified_memory.py, megatron-core 0.15, builds a CUDA extension when it is
imported and survives RuntimeError, ImportError and OSError; without a GPU torch.utils.cpp_extension ends in an
IndexError instead. Told that there is no toolkit, torch raises the OSError that Megatron expects.
"""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from typing import Any

from nemo_skymoe import gpus

ENVIRONMENT = {"TORCH_CUDA_ARCH_LIST": "8.0", "CUDA_HOME": "/nonexistent"}
"""Does the same for a process that imports Megatron before it can call `apply`: the build starts, and fails as
expected."""
_BUILDER = "megatron.core.inference.unified_memory"


class _HideToolkit(MetaPathFinder):
    """Acts at the moment of that import. Until then nobody pays for torch, and other processes are not reached."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: Any = None) -> None:
        if fullname == _BUILDER:
            from torch.utils import cpp_extension

            if not gpus.visible():
                cpp_extension.CUDA_HOME = None


def apply() -> bool:
    """Guard the import, and say whether there is anything left to guard, once."""
    if _BUILDER in sys.modules or any(isinstance(finder, _HideToolkit) for finder in sys.meta_path):
        return False
    sys.meta_path.insert(0, _HideToolkit())
    return True
