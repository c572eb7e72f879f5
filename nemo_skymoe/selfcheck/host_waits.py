"""How often the host waits for the device while it runs a function."""

import warnings
from collections.abc import Callable
from typing import Any

import torch

from nemo_skymoe import gpus


def host_waits(run: Callable[[], Any]) -> str:
    """Return the number of synchronisations that CUDA reports, as text; "uncounted" on a CPU, which waits for nothing."""
    if not gpus.in_use():
        return "uncounted"
    run()
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return str(sum("synchroniz" in str(warning.message) for warning in told))
