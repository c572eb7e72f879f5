"""The table of every option that decides a training, by recipe, with which both front doors are compared.

The doors cannot be in one environment. `tests/recipes/test_door_options.py` compares the table with NeMo's side,
`tests/bridge/test_door_options.py` with Megatron-Bridge's. After a change: SKYMOE_GOLDEN=write pytest on the first.
"""

import dataclasses
import enum
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_name("door_options.json")
Options = dict[str, Any]
CHECKPOINT = "checkpoint"


def plain(value: Any) -> Any:
    """A value as JSON has it; functions and classes by their names."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, Mapping):
        return {str(name): plain(each) for name, each in value.items()}
    if callable(value):
        return getattr(value, "__name__", type(value).__name__)
    return str(value)


def fields_of(section: str, config: Any) -> Options:
    """Every option of a dataclass by its name, but for what only a running training has."""
    return {
        f"{section}.{field.name}": plain(getattr(config, field.name))
        for field in dataclasses.fields(config)
        if not field.name.startswith("_") and hasattr(config, field.name)
    }


def rates_at(steps: int, warmup: int, decay: int) -> list[int]:
    """The steps at which learning rates are compared: every bend of the schedule, and between the bends."""
    end = steps - decay
    near = {
        0,
        1,
        warmup,
        warmup + 1,
        (warmup + end) // 2,
        end - 1,
        end,
        end + 1,
        (end + steps) // 2,
        steps - 1,
    }
    return sorted(step for step in near if 0 <= step < steps)


def read() -> dict[str, Options]:
    """The table: options by recipe."""
    stored = json.loads(TABLE.read_text())
    return {name: {**stored["all"], **own} for name, own in stored["recipes"].items()}


def write(table: dict[str, Options]) -> None:
    """Store what is equal for all recipes once, and of each what is not."""
    first, *others = table.values()
    shared = {
        option: value
        for option, value in first.items()
        if all(option in other and other[option] == value for other in others)
    }
    own = {
        name: {option: value for option, value in options.items() if option not in shared}
        for name, options in table.items()
    }
    TABLE.write_text(json.dumps({"all": shared, "recipes": own}, indent=1) + "\n")
