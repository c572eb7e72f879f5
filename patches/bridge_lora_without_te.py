"""Bridge's LoRA without Transformer Engine.

Upstream: megatron/bridge/peft/utils.py and module_matcher.py, Megatron-Bridge 0.6: Megatron-Core's layers on top of
Transformer Engine count as present where it is absent, although Megatron-Core has None or a mock in the place of each.
Comparing a module with these ends in isinstance's TypeError.
"""

from typing import Any

from .targets import replace

_FLAGS = ("HAVE_TE_COL_LINEAR", "HAVE_TE_LN_COL_LINEAR", "HAVE_TE_ROW_LINEAR")


def apply() -> bool:
    """Tell Bridge what is absent, and say whether that was needed."""
    from megatron.bridge.peft import module_matcher, utils

    found: Any = utils
    if not found.HAVE_TE or all(
        isinstance(layer, type) for layer in (*found.TECL, *found.TERL, found.TELinear)
    ):
        return False
    replace(found, "HAVE_TE", False)
    for flag in _FLAGS:
        replace(module_matcher, flag, False)
    return True
