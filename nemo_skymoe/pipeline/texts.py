"""Read the options of a plan from a command line or a file: numbers of layers, gigabytes, the file of a profile."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_skymoe.architecture import Architecture, integer

if TYPE_CHECKING:
    from nemo_skymoe.pipeline.plans import Plan


def planned(
    model: Architecture,
    *,
    memory_limit: float | None = None,
    layers: str | None = None,
    profile: Path | None = None,
    **options: Any,
) -> "Plan":
    """Plan as `skymoe plan` does from its options: `memory_limit` is in GB, and `layers` is text such as 5,5,5,5,4."""
    from nemo_skymoe.pipeline.planning import plan as make_plan
    from nemo_skymoe.pipeline.profile import read_profile

    return make_plan(
        model,
        memory_limit=None if memory_limit is None else memory_limit * 1e9,
        layers=None if layers is None else [integer("layers", count) for count in layers.split(",")],
        profile=None if profile is None else read_profile(profile),
        **options,
    )
