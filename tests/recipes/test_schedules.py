"""The learning rate of every recipe at every step, in runs of other lengths than the recipe's."""

import itertools
import math
from typing import Any

import fiddle as fdl
import pytest
import torch

from nemo_skymoe.nemo.schedule_length import follow_max_steps
from tests.recipes.factories import FACTORIES, VARIANTS

LONGEST = 2000
"""Steps up to which torch's scheduler is run; beyond, what it multiplies the peak with is asked for."""


def recipes() -> dict[tuple[Any, ...], Any]:
    """Every learning-rate schedule of the recipes, once, at both sizes at which it differs."""
    found = {}
    for command, arguments in VARIANTS:
        for scale in (None, "miniature", "toy"):
            made = FACTORIES[command](**arguments, scale=scale)
            schedule = made.optim.lr_scheduler
            assert schedule.max_steps == made.trainer.max_steps
            key = tuple(
                getattr(schedule, name)
                for name in ("shape", "warmup_steps", "max_steps", "final_fraction", "decay_steps")
            )
            found[key] = made.optim
    return found


def shares(schedule: Any, steps: int) -> list[float]:
    """Of the peak at every step, and after the last."""
    if steps > LONGEST:
        return [schedule.factor(step) for step in range(steps + 1)]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = schedule.scheduler(None, optimizer)["lr_scheduler"]["scheduler"]
    found = [optimizer.param_groups[0]["lr"]]
    for _ in range(steps):
        optimizer.step()
        scheduler.step()
        found.append(optimizer.param_groups[0]["lr"])
    return found


def by_hand(key: tuple[Any, ...], steps: int) -> list[float]:
    """Of the peak, by the report's words: up, along the shape, and where there is a decay down to zero."""
    shape, warmup, total, final, decay = key
    end, found = total - decay, []
    for step in range(steps + 1):
        along = max(0.0, min(1.0, (step - warmup) / (end - warmup)))
        left = {"cosine": (1 + math.cos(math.pi * along)) / 2, "linear": 1 - along, "constant": 1.0}[shape]
        share = final + (1 - final) * left
        if step < warmup:
            share = (step + 1) / (warmup + 1)
        if step > end:
            share = final * (total - step) / decay
        found.append(share)
    return found


def test_every_recipe_keeps_its_shape_however_long_it_runs() -> None:
    """A shorter run is the recipe's with steps left out, a longer one has its warm-up and decay in a longer shape."""
    schedules = recipes()
    assert len(schedules) > 12
    for key, optim in schedules.items():
        total = key[2]
        full = by_hand(key, total)
        assert key[1] + key[4] <= 0.9 * total, (key, "leaves no room for its shape")
        lengths = {1, 2, 10, 100, 4386, total - 1, total, total + 1} - {0}
        for steps in sorted(lengths):
            fitted = fdl.build(optim)
            follow_max_steps(fitted, steps)
            found = shares(fitted.lr_scheduler, steps)
            if steps >= total:
                longer = by_hand((*key[:2], steps, *key[3:]), steps)
                assert max(abs(one - other) for one, other in zip(found, longer, strict=True)) < 1e-12, key
                continue
            stride = total / steps
            around = 1.5 * stride  # lengths are whole steps
            for step, share in enumerate(found):
                window = full[
                    max(0, int((step - 1) * stride - around)) : math.ceil((step + 1) * stride + around) + 1
                ]
                assert min(window) - 1e-9 <= share <= max(window) + 1e-9, (key, steps, step)
            if steps >= 10:
                assert found[-1] == pytest.approx(full[-1], abs=1e-12), (key, steps)
                wide = math.ceil(stride)
                steepest = max(
                    full[n] - full[min(total, n + wide)] for n in range(0, total, max(1, wide // 4))
                )
                drop = max(before - after for before, after in itertools.pairwise(found))
                assert drop <= 1.3 * steepest + 1e-9, (key, steps)
