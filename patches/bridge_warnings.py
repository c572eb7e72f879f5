"""Warnings of this package in a training of Megatron-Bridge.

Upstream: megatron/training/utils/log_utils.py, megatron-core 0.19: `setup_logging`, which Bridge (0.6,
megatron/bridge/training/setup.py) calls with `logger.filter_warnings=True` unless told otherwise, silences the warnings of
every logger that exists, whoever it belongs to: that a checkpoint has no coefficients, for example, nobody would read.
"""

import functools
import logging
from typing import Any

from .targets import replace

_PACKAGE = "nemo_skymoe"


def apply() -> bool:
    """Leave our own warnings alone, and say whether that was not done yet."""
    from megatron.bridge.training import setup

    original: Any = getattr(setup, "setup_logging", apply)
    if hasattr(original, "__wrapped__"):
        return False

    @functools.wraps(original)
    def setup_logging(*args: Any, **kwargs: Any) -> None:
        ours = [logging.getLogger(name) for name in logging.root.manager.loggerDict if _is_ours(name)]
        kept = [list(logger.filters) for logger in ours]
        original(*args, **kwargs)
        for logger, filters in zip(ours, kept, strict=True):
            logger.filters[:] = filters

    replace(setup, "setup_logging", setup_logging)
    return True


def _is_ours(name: str) -> bool:
    return name.partition(".")[0] == _PACKAGE
