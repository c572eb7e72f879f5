"""NeMo's contexts built only of what is on the list of `nemo_skymoe/checkpoint/allowed_classes.py`.

Upstream: nemo/lightning/io/mixin.py, NeMo 2.5 to 2.7: `load`, behind `load_context` and `nemo llm export`, imports and
calls whatever a checkpoint's `context/io.json` names, `os.system` too.
"""

from pathlib import Path
from typing import Any


def apply() -> bool:
    """Walk every context before NeMo reads it; says whether that was not done yet."""
    from nemo.lightning.io import api

    from nemo_skymoe.checkpoint.context_check import check_context

    load = api.load
    if hasattr(load, "checks"):
        return False

    def checked(path: Path, *args: Any, **kwargs: Any) -> Any:
        folder = Path(path)
        check_context(folder if folder.is_dir() else folder.parent)
        return load(path, *args, **kwargs)

    setattr(checked, "checks", True)  # noqa: B010
    api.load = checked
    return True
