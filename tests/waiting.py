"""Waiting for an event, however busy the machine is. No other file of the tests reads a clock."""

import time
from collections.abc import Callable
from typing import TypeVar

HANG = 600.0
"""Seconds after which an event is taken never to come: a limit for what hangs, far above what a busy machine needs."""
Found = TypeVar("Found")


def wait_until(
    what: str, condition: Callable[[], Found | None], hang: float = HANG, pause: float = 0.02
) -> Found:
    """Return what `condition` answers as soon as that is true.

    Args:
        what: The event, for the message.
        condition: Asked again and again.
        hang: Seconds until the event is taken never to come.
        pause: Seconds between two questions.

    Raises:
        TimeoutError: It did not come.
    """
    deadline = time.monotonic() + hang
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {hang:g} s: {what}")
        time.sleep(pause)
    return found
