"""How many operations a function dispatches that start a kernel on a GPU, counted on any device.

Counted is every operation of PyTorch's `aten` that reaches a device: below autograd, and after functions that are made of
others were taken apart. An operation does not count if it only looks at a tensor in another way (its result is an alias of
an input that it does not write to) or only reserves memory. A few operations start two kernels; each counts as one.
"""

from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

# The last is a view whose schema does not say so.
_NO_KERNEL = ("empty", "new_empty", "_unsafe_view")


class Launches(TorchDispatchMode):
    """Inside its `with` block, `names` gets the name of every operation that starts a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not _only_looks(func) and not func.overloadpacket.__name__.startswith(_NO_KERNEL):
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def _only_looks(func: Any) -> bool:
    aliases = [result.alias_info for result in func._schema.returns if result.alias_info is not None]
    return bool(aliases) and not any(alias.is_write for alias in aliases)


def launches(function: Callable[[], Any]) -> tuple[int, Any]:
    """Return how many kernels `function` starts, and its result."""
    with Launches() as counted:
        result = function()
    return len(counted.names), result
