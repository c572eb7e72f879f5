"""NeMo's LoRA without Transformer Engine.

Upstream: nemo/collections/llm/peft, NeMo 2.5 to 2.7: `LoRA.transform` compares the class of every module that it
adapts with Transformer Engine's `Linear`, which raises UnavailableError where that was not imported; and Megatron's
classes on top of it count as present where they are None, which ends in isinstance's TypeError.
"""

from types import SimpleNamespace


def apply() -> bool:
    """Tell NeMo what is absent, and say whether that was needed."""
    from nemo.collections.llm.peft import lora, module_matcher, utils

    if lora.HAVE_TE:
        return False
    lora.te = SimpleNamespace(Linear=_NoModule)
    utils.HAVE_TE = False
    for name in ("HAVE_TE_COL_LINEAR", "HAVE_TE_LN_COL_LINEAR", "HAVE_TE_ROW_LINEAR"):
        setattr(module_matcher, name, False)
    return True


class _NoModule: ...
