"""Work, counted: it is the same number on an idle machine and on a busy one."""

import gc
import sys
from collections import Counter
from collections.abc import Callable
from types import FrameType
from typing import Any


def count_calls(function: Callable[[], Any]) -> int:
    """Calls of Python and built-in functions that are made until `function` has returned."""
    counts: Counter[str] = Counter()

    def count(frame: FrameType, event: str, argument: Any) -> None:
        counts[event] += 1

    gc.collect()  # what earlier tests have left must not be cleared away meanwhile
    gc.disable()
    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(None)
        gc.enable()
    return counts["call"] + counts["c_call"]
