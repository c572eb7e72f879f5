"""benchmarks/compat.md: what every pair did, as tables."""

import platform
from collections.abc import Sequence
from datetime import date
from typing import Any

_INTRODUCTION = """\
# NeMo with megatron-core

`make compat`, {date}, {machine}, {ranks}

Every pair has an environment of its own: what the columns name, and behind it the pinned one of `constraints.txt`,
whose torch, Lightning and nvidia-modelopt all pairs share. NeMo-Run is the version of NVIDIA's container with that NeMo.
The pinned pair is the one that `make test` runs with.

- **Modules**: all of `nemo_skymoe`, `recipes` and `patches`, imported.
- **Dry runs**: `nemo llm pretrain|finetune --factory NAME --dryrun` for every recipe.
- **Tests**: `tests/patches`, `tests/nemo/test_moe_training.py` (a resumed run equals the uninterrupted one to the last
  bit: losses, parameters, coefficients) and `tests/recipes/test_factories.py`. Skipped is what a version does not have,
  or what it has no need of.
- **Losses**: below, of `nemo llm pretrain --factory NAME --yes` on 2 ranks.
"""


def markdown(outcomes: Sequence[Any]) -> str:
    """The page."""
    machine = (
        f"{platform.system()} {platform.machine()}, torch {outcomes[0].versions['torch']}" if outcomes else ""
    )
    introduction = _INTRODUCTION.format(date=date.today(), machine=machine, ranks="ranks over gloo")
    return "\n".join([introduction, *_what_ran(outcomes), *_losses(outcomes), *_verdicts(outcomes), ""])


def _what_ran(outcomes: Sequence[Any]) -> list[str]:
    lines = [
        "| NeMo | megatron-core | NeMo-Run | also | modules | dry runs | tests |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in outcomes:
        also = ", ".join(x.replace("==", " ") for x in one.beside if not x.startswith("nemo_run"))
        ran = [
            f"{one.found[kind]['result']} in {one.found[kind]['seconds']} s"
            for kind in ("modules", "dry runs")
        ]
        lines.append(_row(*one.pair, one.versions["nemo_run"], also, *ran, one.tests))
    return lines


def _losses(outcomes: Sequence[Any]) -> list[str]:
    lines = []
    for kind, title in (
        (
            "tiny",
            "`skywork_moe_tiny` with EDP: 3 steps, a checkpoint, and 3 more by a second command that resumes",
        ),
        (
            "rates",
            "`skywork_moe_1p8b(scale=toy,learning_rates=expert)`: the experts' learning rate is a quarter",
        ),
    ):
        steps = range(1, len(outcomes[0].found[kind]["result"]) + 1) if outcomes else ()
        lines += [
            "",
            title,
            "",
            "| NeMo | megatron-core |" + "".join(f" step {n} |" for n in steps) + " seconds |",
        ]
        lines.append("|---|---|" + "---|" * (len(steps) + 1))
        for one in outcomes:
            found = one.found[kind]
            lines.append(_row(*one.pair, *(f"{loss:.7f}" for loss in found["result"]), found["seconds"]))
    return lines


def _verdicts(outcomes: Sequence[Any]) -> list[str]:
    lines = [
        "",
        "What `skymoe doctor` says, and the patches of upstream defects that apply beside the CPU runtime:",
        "",
    ]
    for one in outcomes:
        names = ", ".join(f"`{name}`" for name in one.patches)
        lines.append(f"- {one.verdict} {names}.")
    return lines


def _row(*cells: Any) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"
