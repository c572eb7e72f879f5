"""benchmarks/compat.md: what every pair did, as tables."""

import platform
from collections.abc import Iterable, Sequence
from datetime import date
from typing import Any

_INTRODUCTION = """\
# NeMo with megatron-core

    make compat

{date}, {machine}, {torch}; ranks on the CPU over gloo.

Every pair has an environment of its own with the packages that the columns name. Behind it stands the pinned environment of
`constraints.txt`, whose torch, Lightning and nvidia-modelopt all pairs share. NeMo-Run has the version of NVIDIA's container
with that NeMo, and transformers the version that the NeMo requires. `make test` runs with the pinned pair, {pinned}.

- **Modules** are those of `nemo_skymoe`, with `recipes` and `patches`, that were imported.
- **Dry runs** are `nemo llm pretrain --factory NAME --dryrun`, or `finetune`, of every recipe.
- **Tests** are `tests/patches`, `tests/nemo/test_moe_training.py` (a resumed run equals the uninterrupted one to the last
  bit: losses, parameters, coefficients), `tests/recipes/test_factories.py`, and the test of the experts' own learning rate in
  `test_toys.py`. A skipped test is about a defect of other versions.
- **Losses** are those of `nemo llm pretrain --factory NAME --yes` on two ranks, in the order of the steps.
"""
_TRAININGS = {
    "tiny": "`skywork_moe_tiny` with EDP: 3 steps, a checkpoint, and 3 more by a second command that resumes",
    "rates": "`skywork_moe_1p8b(scale=toy,learning_rates=expert)`: experts at a quarter of the learning rate",
}
_NOTE = """\
With megatron-core 0.16 the last loss of the second training differs in its fifth decimal. The clipping of the gradients makes
the difference: with `optim.config.clip_grad=0.0`, which clips nothing, NeMo 2.7.3 gave the same four losses to the last bit with
0.15.3 and 0.16.1 (2026-11-28). The norm is probably summed in another order, that of 0.16's parameter groups.
"""


def markdown(outcomes: Sequence[Any], pinned: tuple[str, str]) -> str:
    """The page, of one outcome or more."""
    introduction = _INTRODUCTION.format(
        date=date.today(),
        machine=f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        torch=f"torch {outcomes[0].versions['torch']}",
        pinned=" with ".join(pinned),
    )
    lines = [introduction, *_what_ran(outcomes)]
    for training, title in _TRAININGS.items():
        lines += ["", f"{title}:", "", *_losses(outcomes, training)]
    return "\n".join([*lines, "", _NOTE, *_verdicts(outcomes), ""])


def _what_ran(outcomes: Sequence[Any]) -> Iterable[str]:
    yield _row("NeMo", "megatron-core", "NeMo-Run", "transformers", "modules", "dry runs", "tests")
    yield _row(*["---"] * 7)
    for one in outcomes:
        found = one.found
        versions = one.versions["nemo_run"], one.versions["transformers"]
        yield _row(*one.pair, *versions, found["modules"], found["dry_runs"], one.tests)


def _losses(outcomes: Sequence[Any], training: str) -> Iterable[str]:
    steps = range(1, len(outcomes[0].found[training]["losses"]) + 1)
    yield _row("NeMo", "megatron-core", *(f"step {step}" for step in steps), "seconds")
    yield _row(*["---"] * (len(steps) + 3))
    for one in outcomes:
        found = one.found[training]
        yield _row(*one.pair, *(f"{loss:.7f}" for loss in found["losses"]), found["seconds"])


def _verdicts(outcomes: Sequence[Any]) -> Iterable[str]:
    yield "`skymoe doctor` said this of the pairs, with the patches that apply beside the CPU runtime:"
    yield ""
    for one in outcomes:
        yield f"- {one.verdict} {', '.join(f'`{name}`' for name in one.patches)}."


def _row(*cells: Any) -> str:
    return f"| {' | '.join(map(str, cells))} |"
