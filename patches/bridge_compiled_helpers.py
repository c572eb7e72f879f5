"""Megatron-Bridge with the wheel of Megatron-Core, which brings its dataset helpers compiled.

Upstream: megatron/core/datasets/utils.py, megatron-core 0.14 to 0.19: `compile_helpers` runs make in a folder for which
the wheel has no Makefile, and ends the process where that fails. Bridge calls it in every start
(megatron/bridge/training/initialize.py), although the compiled helpers are there.
"""

from pathlib import Path

from .targets import replace


def apply() -> bool:
    """Leave the compilation out where the helpers are there and cannot be compiled; say whether that was needed."""
    from megatron.bridge.training import initialize
    from megatron.core import datasets

    if initialize.compile_helpers is _compiled_already:
        return False
    folder = Path(datasets.__file__).parent
    if (folder / "Makefile").exists() or not any(folder.glob("helpers_cpp*.so")):
        return False
    replace(initialize, "compile_helpers", _compiled_already)
    return True


def _compiled_already() -> None: ...
