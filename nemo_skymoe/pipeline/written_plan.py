"""The pipeline plan in a file of `skymoe plan --output`, as a training reads it."""

import json
from pathlib import Path

from nemo_skymoe.config import ConfigurationError


def read_plan(file: str | Path) -> tuple[str, list[list[int]] | None]:
    """Return Megatron's layout in a file, and the recomputed layers of every chunk.

    Raises:
        ConfigurationError: The file does not exist, or is not a plan.
    """
    try:
        plan = json.loads(Path(file).read_text())
        return plan["layout"], plan["recompute"]
    except (OSError, ValueError, KeyError, TypeError) as reason:
        raise ConfigurationError(
            f"the pipeline plan '{file}' cannot be read, expected what `skymoe plan --output` writes: {reason!r}"
        ) from None
