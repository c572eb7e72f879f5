"""Unbalanced pipelines: this package decides which layers are on which stage, and which of them are recomputed."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nemo_skymoe.pipeline.planning import plan

__all__ = ["plan"]


def __getattr__(name: str) -> Any:
    """Import `plan` when it is asked for, because it loads NumPy, which the rest of the package does not need."""
    if name != "plan":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from nemo_skymoe.pipeline.planning import plan

    return plan
