"""NeMo's contexts built only of what is on the list of `nemo_skymoe/checkpoint/allowed_classes.py`.

Upstream: nemo/lightning/io/mixin.py, NeMo 2.5 to 2.7: `load`, behind `load_context`, `nemo llm export`, generation and
evaluation, imports and calls whatever a checkpoint's `context/io.json` names, `os.system` too; then Megatron unpickles
what is beside the weights.
"""

import functools
from pathlib import Path
from typing import Any


def apply() -> bool:
    """Walk every context, and the checkpoint that it is of, before NeMo reads it; says whether that was not done yet."""
    from nemo.lightning import io
    from nemo.lightning.io import api, mixin

    from nemo_skymoe.checkpoint.context_check import check_loaded

    load = mixin.load
    if hasattr(load, "checks"):
        return False

    @functools.wraps(load)
    def checked(path: Path, *args: Any, **kwargs: Any) -> Any:
        check_loaded(Path(path))
        return load(path, *args, **kwargs)

    setattr(checked, "checks", True)  # noqa: B010
    for module in (io, api, mixin):  # each has the name for itself
        setattr(module, "load", checked)  # noqa: B010
    return True
