"""The values of a configuration file: each one checked, logged when read, and logged louder when it is absent."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

from nemo_skymoe.durable.errors import CheckpointError
from nemo_skymoe.durable.stand_in import LFS_POINTER, refuse_stand_in

logger = logging.getLogger(__name__)

LARGEST = 2**31
"""No size of a model comes near it; a table of so many tensors would not fit into memory."""


class ConfigValues:
    """Reads values by name. Every method raises CheckpointError, naming file and value, for a wrong one.

    Args:
        raw: The parsed file.
        place: The name that messages give it.
    """

    def __init__(self, raw: dict[str, Any], place: str):
        self.raw, self.place = raw, place
        self._asked: set[str] = set()

    def value(self, name: str, default: Any) -> Any:
        """Return the value as it is, or `default` if the file has none or null."""
        self._asked.add(name)
        value = self.raw.get(name)
        if value is not None:
            logger.info("%s: %s is %r", self.place, name, value)
            return value
        if default is not None:
            logger.warning("%s has no %s: taken to be %r", self.place, name, default)
        return default

    def size(self, name: str, default: int | None = None) -> int:
        """Return a positive integer; with no default it must be there."""
        value = self.value(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < LARGEST:
            raise self.wrong(name, "a positive integer")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """Return a positive finite number. Without a default it must be there."""
        value = self.value(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise self.wrong(name, "a positive number")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """Return true or false."""
        value = self.value(name, default)
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return value

    def asked(self, name: str) -> bool:
        """Say whether the value was read."""
        return name in self._asked

    def known(self, *names: str) -> None:
        """Count these as read: they say nothing about the function that the model computes."""
        self._asked.update(names)

    def log_unknown(self) -> None:
        """Log a line for every value that nobody asked for."""
        for name in sorted(self.raw.keys() - self._asked):
            if (value := self.raw[name]) not in (None, False) and value not in ("", [], {}):
                logger.warning("%s: %s is %r, which is unknown here and not used", self.place, name, value)

    def wrong(self, name: str, expected: str) -> CheckpointError:
        """Return the error to raise about a value."""
        return CheckpointError(f"{self.place}: {name} is {self.raw.get(name)!r}, expected {expected}")


def read_json(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        CheckpointError: There is no such file, or it holds something else.
    """
    content = read_bytes(file)
    refuse_stand_in(file, content)
    try:
        value = json.loads(content, parse_constant=_refuse)
    except (ValueError, RecursionError) as reason:
        raise CheckpointError(f"'{file}' is not JSON: {reason}") from reason
    if not isinstance(value, dict):
        raise CheckpointError(f"'{file}' holds a {type(value).__name__}, expected an object")
    return value


def read_yaml(file: Path) -> dict[str, Any]:
    """Return the mapping of plain values in a YAML file. Nothing that the file names is built.

    Raises:
        CheckpointError: There is no such file, or it holds something else.
    """
    import yaml  # with NeMo or Bridge, which wrote the file, comes PyYAML

    content = read_bytes(file)
    refuse_stand_in(file, content)
    try:
        value = yaml.safe_load(content)
    except (yaml.YAMLError, ValueError, RecursionError) as reason:
        said = " ".join(str(reason).split())
        raise CheckpointError(f"'{file}' is not YAML of plain values: {said}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"'{file}' holds a {type(value).__name__}, expected a mapping")
    return value


def read_bytes(file: Path) -> bytes:
    """Return the content of a file; CheckpointError if it cannot be read."""
    try:
        content = file.read_bytes()
    except OSError as reason:
        raise CheckpointError(f"'{file}' cannot be read: {reason.strerror}") from reason
    if content.startswith(LFS_POINTER):
        refuse_stand_in(file, content)
    return content


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a JSON value")
