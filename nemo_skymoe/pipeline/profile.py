"""Replace the cost model's times and bytes of blocks by measured ones."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.pipeline.problem import Block

NUMBERS = tuple(field.name for field in fields(Block) if field.name != "kind")


def read_profile(path: str | Path) -> Mapping[str, Any]:
    """Read the JSON object in `path`, for `measured_blocks`.

    Raises:
        ConfigurationError: The file cannot be read, or holds no JSON object.
    """
    try:
        profile = json.loads(Path(path).read_text())
    except OSError as reason:
        raise ConfigurationError(
            f"profile {path} cannot be read: {reason.strerror}; expected a JSON file of measured blocks"
        ) from reason
    except ValueError as reason:
        raise ConfigurationError(f"profile {path} is no JSON: {reason}") from reason
    if not isinstance(profile, dict):
        raise ConfigurationError(f"profile {path} holds a {type(profile).__name__}, expected an object")
    return profile


def measured_blocks(blocks: Sequence[Block], profile: Mapping[str, Any]) -> tuple[Block, ...]:
    """Return `blocks` with the numbers that `profile` has measured.

    Args:
        blocks: The blocks as the cost model counts them.
        profile: For each kind (`embedding`, `layer`, `head`) an object of `Block`'s numbers: seconds of one micro-batch
            on one GPU, or bytes. `layer` may be a list with one object per layer. Numbers that are left out stay as
            counted, but `recompute` follows a measured `forward`.

    Raises:
        ConfigurationError: A name is unknown, a value is not a number, or the number of layers differs from the
            model's.
    """
    unknown = set(profile) - {block.kind for block in blocks}
    if unknown:
        raise ConfigurationError(f"profile has {sorted(unknown)}, expected embedding, layer and head")
    layers = sum(block.kind == "layer" for block in blocks)
    rows = {
        kind: iter(
            measured if isinstance(measured, list) else [measured] * (layers if kind == "layer" else 1)
        )
        for kind, measured in profile.items()
    }
    measured = profile.get("layer")
    if isinstance(measured, list) and len(measured) != layers:
        raise ConfigurationError(f"profile has {len(measured)} layers, expected the model's {layers}")
    return tuple(
        _measured(block, next(rows[block.kind])) if block.kind in rows else block for block in blocks
    )


def _measured(block: Block, numbers: Any) -> Block:
    if not isinstance(numbers, Mapping):
        raise ConfigurationError(
            f"profile: {block.kind} is {numbers!r}, expected an object of {', '.join(NUMBERS)}"
        )
    for name, value in numbers.items():
        if name not in NUMBERS:
            raise ConfigurationError(f"profile: {block.kind} has {name!r}, expected {', '.join(NUMBERS)}")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise ConfigurationError(
                f"profile: {name} of {block.kind} is {value!r}, expected a number of at least 0"
            )
    recompute = {"recompute": numbers["forward"]} if "forward" in numbers and block.kind == "layer" else {}
    return replace(block, **{**recompute, **numbers})
