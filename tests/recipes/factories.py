"""Every factory of one model by what a user types, and the arguments by which the report's experiments differ."""

import importlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import fiddle as fdl

from nemo_skymoe.recipes.registry import FIXED, Recipe


def factories(recipes: Iterable[Recipe]) -> dict[str, Callable[..., Any]]:
    """ "pretrain NAME" and "finetune NAME" to factory."""
    found = {}
    for recipe in recipes:
        module = importlib.import_module(f"nemo_skymoe.recipes.{recipe.module}")
        found[f"pretrain {recipe.name}"] = getattr(module, recipe.pretrain)
        if recipe.finetune:
            found[f"finetune {recipe.name}"] = getattr(module, recipe.finetune)
    return found


FACTORIES = factories(FIXED)
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((command, {}) for command in FACTORIES),
    *(
        ("pretrain skywork_moe_300m_x8", {"start": start, "budget": budget, "resume_path": "upcycled"})
        for start in ("100b", "300b", "300b_high_lr")
        for budget in ("100b", "300b")
    ),
    ("pretrain skywork_moe_300m_x8", {"budget": "300b"}),
    *(("pretrain skywork_moe_2p5b", {"normalisation": scale}) for scale in ("off", "0.5", "2")),
    *(("pretrain skywork_moe_1p8b", {"learning_rates": rates}) for rates in ("expert", "all")),
    ("pretrain skywork_1p3b", {"train_only_ffn": True, "resume_path": "dense"}),
    ("pretrain skywork_moe_1p3b_x8", {"sources": 4, "resume_path": "upcycled"}),
    *((command, {"peft_scheme": "none"}) for command in FACTORIES if command.startswith("finetune")),
]
"""Factory and arguments."""


def label(variant: tuple[str, dict[str, Any]]) -> str:
    """A variant as a test's id."""
    command, arguments = variant
    return ",".join([command.replace(" ", "-"), *(f"{k}={v}" for k, v in arguments.items())])


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of a configuration by its path, the classes of its parts included."""
    if isinstance(value, fdl.Buildable):
        yield f"{path}()", value.__fn_or_cls__
        for name, part in fdl.ordered_arguments(value).items():
            yield from leaves(part, f"{path}.{name}".lstrip("."))
    elif isinstance(value, list | tuple):
        for index, part in enumerate(value):
            yield from leaves(part, f"{path}[{index}]")
    else:
        yield path, value
