"""Read the options of a plan from a command line or a file: numbers of layers, gigabytes, the file of a profile."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_skymoe.architecture import Architecture, integer
from nemo_skymoe.config import ConfigurationError

if TYPE_CHECKING:
    from nemo_skymoe.pipeline.plans import Plan
    from nemo_skymoe.pipeline.size_search import Found


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
        **_given(options),
    )


def searched(
    model: Architecture,
    *,
    hardware: str,
    num_gpus: int | None = None,
    data_parallel: int | None = None,
    layers: str | None = None,
    profile: Path | None = None,
    memory_limit: float | None = None,
    recompute: bool = True,
    progress: Callable[[int, int], None],
    **options: Any,
) -> "Found":
    """Search as `skymoe plan --search` does: sizes that are None are searched.

    Raises:
        ConfigurationError: An option does not go with a search, or nothing fits.
    """
    from nemo_skymoe.pipeline.hardware import hardware_preset
    from nemo_skymoe.pipeline.planning import Question
    from nemo_skymoe.pipeline.size_search import search

    for name, value in {"data_parallel": data_parallel, "layers": layers, "profile": profile}.items():
        if value is not None:
            raise ConfigurationError(
                f"{name} is {value}, expected none with search, which compares layouts of one num_gpus by the cost model"
            )
    if num_gpus is None:
        raise ConfigurationError("num_gpus is missing, expected the number of all GPUs with search")
    limit = None if memory_limit is None else memory_limit * 1e9
    question = Question(model, hardware_preset(hardware), memory_limit=limit, recompute=recompute)
    return search(question, num_gpus, _given(options), progress=progress)


def _given(options: dict[str, Any]) -> dict[str, Any]:
    """Leave out what is None: the size takes its default, or is searched."""
    return {name: value for name, value in options.items() if value is not None}
