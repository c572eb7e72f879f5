"""NeMo's contexts built only after a check, as that of `nemo_skymoe/checkpoint/torch_dist/pickle_check.py`.

Upstream: nemo/lightning/io/mixin.py, NeMo 2.5 to 2.7: `load`, behind `load_context`, `nemo llm export`, generation and
evaluation, imports and calls whatever a checkpoint's `context/io.json` names, `os.system` too; then Megatron unpickles
what is beside the weights.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any


def apply(check: Callable[[Path], None]) -> bool:
    """Call `check` with the path of every context before NeMo reads it, and say whether that was not done yet."""
    from nemo.lightning import io
    from nemo.lightning.io import api, mixin

    load = mixin.load
    if hasattr(load, "checks"):
        return False

    @functools.wraps(load)
    def checked(path: Path, *args: Any, **kwargs: Any) -> Any:
        check(Path(path))
        return load(path, *args, **kwargs)

    setattr(checked, "checks", True)  # noqa: B010
    for module in (io, api, mixin):  # each has the name for itself
        setattr(module, "load", checked)  # noqa: B010
    return True
