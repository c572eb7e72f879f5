"""Questions that the report leaves open and that decide defaults, on Figure 3's model at lambda 1.

python -m benchmarks.paper.defaults --budget full
"""

from __future__ import annotations

from typing import Any

from benchmarks.paper import figure3, pictures
from benchmarks.paper.claim import UNDECIDED, Claim
from benchmarks.paper.command import Figure, Page, Results, main
from benchmarks.paper.results import Difference, losses, paired
from benchmarks.paper.runs import Run

LABELS = {
    "1": "default",
    "population": "population std",
    "square": "eq. (4)",
    "square_x8": "eq. (4), coefficients x 8",
    "initial_0": "alpha_0 = 0",
    "initial_1e-3": "alpha_0 = 1e-3",
    "scope_rank": "2 ranks, scope rank",
    "scope_edp": "2 ranks, scope edp",
}
REFERENCE = {arm: "scope_rank" if arm.startswith("scope") else "1" for arm in LABELS}
"""What each is compared with: on two ranks under EDP a capacity is of half of the tokens, another question."""
BY = {
    "population": "the sample's, as in the released weights",
    "square": "Switch form, as in Megatron-Core",
    "square_x8": "Switch form, as in Megatron-Core",
    "initial_0": "the maximum, where Figure 4 starts",
    "initial_1e-3": "the maximum, where Figure 4 starts",
    "scope_edp": "a rank's own tokens, as in Megatron-Core",
}
"""What the default is, and whose."""
CONFIG: dict[str, dict[str, Any]] = {
    "population": {"moe_router_logit_norm_correction": 0},
    "square": {"moe_aux_loss_form": "square"},
    # n/2 = 8 makes the gradients of both forms equal where the load is balanced.
    "square_x8": {
        "moe_aux_loss_form": "square",
        "moe_adaptive_aux_loss_maximum": 0.08,
        "moe_adaptive_aux_loss_sensitivity": 1.6,
    },
    "initial_0": {"moe_adaptive_aux_loss_initial": 0.0},
    "initial_1e-3": {"moe_adaptive_aux_loss_initial": 1e-3},
    "scope_rank": {},
    "scope_edp": {"moe_capacity_scope": "edp"},
}
_TWO_RANKS = {
    "trainer.devices": 2,
    "trainer.strategy.tensor_model_parallel_size": 2,
    "trainer.strategy.expert_model_parallel_size": 2,
    "trainer.strategy.sequence_parallel": True,
}


def runs(seed: int) -> list[Run]:
    """Figure 3's run at lambda 1, and one an answer."""
    (reference,) = (run for run in figure3.runs(seed) if run.arm == "1")
    return [reference, *(_answer(reference, arm) for arm in CONFIG)]


def _answer(reference: Run, arm: str) -> Run:
    ranks = 2 if arm.startswith("scope") else 1
    settings = {f"model.config.{option}": value for option, value in CONFIG[arm].items()}
    return Run(
        "defaults", arm, reference.seed, reference.factory, reference.arguments,
        settings | (_TWO_RANKS if ranks == 2 else {}), ranks=ranks,
    )  # fmt: skip


def page(found: Results) -> Page:
    """Each answer's loss and drop rate against the default's."""
    figure, axes = pictures.grid(1, 2, width=5.2, height=3.2)
    rows = []
    differences: dict[str, list[Difference]] = {"Loss": [], "Drop rate": []}
    arms = [arm for arm in LABELS if REFERENCE[arm] != arm]
    for arm in arms:
        runs, reference = found[arm], found[REFERENCE[arm]]
        loss = paired(losses(runs), losses(reference))
        drop = paired(
            [run.at_end("drop_rate") for run in runs], [run.at_end("drop_rate") for run in reference]
        )
        differences["Loss"].append(loss)
        differences["Drop rate"].append(drop)
        rows.append((LABELS[arm], BY[arm], loss, loss.verdict, drop, drop.verdict))
    for axis, (name, found_differences) in zip(axes[0], differences.items(), strict=True):
        names = [LABELS[arm] for arm in arms]
        pictures.against(axis, names, [None] * len(arms), found_differences, f"{name} minus the default's")
        axis.axhline(0, color="black", linewidth=0.6)
        axis.tick_params(axis="x", labelsize=7, rotation=25)
    columns = ("answer", "default", "loss minus the default's", "", "drop rate minus the default's", "")
    better = [
        LABELS[arm] for arm, loss in zip(arms, differences["Loss"], strict=True) if loss.verdict == "lower"
    ]
    rule = (
        "A default stays what it is unless the seeds decide that another answer has the lower loss. They do for:"
        f" {', '.join(better) or 'none of these'}."
    )
    return Page(figure, [*pictures.table(columns, rows), "", rule])


def claims(found: Results) -> list[Claim]:
    """Each question with its answer's loss against the default's."""
    made = []
    for arm in CONFIG:
        if REFERENCE[arm] == arm:
            continue
        ours = paired(losses(found[arm]), losses(found[REFERENCE[arm]]))
        verdict = {"lower": "better than the default", "higher": "worse than the default"}.get(
            ours.verdict, UNDECIDED
        )
        statement = f"loss, {LABELS[arm]} minus {LABELS[REFERENCE[arm]]}"
        made.append(Claim("not given", statement, "not published", str(ours), verdict))
    return made


FIGURE = Figure("defaults", "Questions that decide defaults", runs, page, claims)

if __name__ == "__main__":
    main(FIGURE)
