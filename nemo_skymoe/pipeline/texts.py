"""A plan's options as a command line or a file gives them: a model by its dimensions, a layout by its counts, gigabytes."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_skymoe.config import ConfigurationError

if TYPE_CHECKING:
    from nemo_skymoe.pipeline.plans import Plan


def planned(
    model: str,
    *,
    memory_limit: float | None = None,
    layers: str | None = None,
    profile: Path | None = None,
    **options: Any,
) -> "Plan":
    """What `skymoe plan` makes of its options; `memory_limit` in GB, `layers` as in 5,5,5,5,4."""
    from nemo_skymoe.pipeline.planning import plan as make_plan
    from nemo_skymoe.pipeline.profile import read_profile

    return make_plan(
        model_sizes(model),
        memory_limit=None if memory_limit is None else memory_limit * 1e9,
        layers=None if layers is None else [_integer("layers", count) for count in layers.split(",")],
        profile=None if profile is None else read_profile(profile),
        **options,
    )


def model_sizes(text: str) -> str | dict[str, int | tuple[int, ...]]:
    """A model's name as it is; `num_layers=4,moe_layer_freq=[0,1,1,1]` as a dictionary."""
    if "=" not in text:
        return text
    pairs = [part.partition("=") for part in re.split(r",(?![^\[]*\])", text)]
    return {name.strip(): _size(name.strip(), value.strip()) for name, _, value in pairs}


def _size(name: str, value: str) -> int | tuple[int, ...]:
    if value.startswith("[") and value.endswith("]"):
        return tuple(_integer(name, one) for one in value[1:-1].split(","))
    return _integer(name, value)


def _integer(name: str, value: str) -> int:
    try:
        return int(value)
    except ValueError:
        raise ConfigurationError(f"{name} is {value!r}, expected an integer") from None
