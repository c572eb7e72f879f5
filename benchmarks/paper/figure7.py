"""Figure 7 (appendix C.1): the experts' learning rate, 32 experts.

python -m benchmarks.paper.figure7 --budget full
"""

from __future__ import annotations

from benchmarks.paper import pictures
from benchmarks.paper.claim import Claim, equal, signed
from benchmarks.paper.command import Figure, Page, Results, main
from benchmarks.paper.results import Result, losses, paired
from benchmarks.paper.runs import Run

LABELS = {"baseline": "6e-3", "expert": "experts 1.5e-3, others 6e-3", "all": "1.5e-3"}
REPORT = {"baseline": (2.24, 2.20), "expert": (2.225, 2.20), "all": (2.215, 2.20)}
"""Losses read off the report's figure: at the end of the linear decay to a tenth, and after the decay to zero."""
TOKENS, DECAY_TOKENS = 100e9, 10e9 / 3
"""A third of the report's."""


def runs(seed: int) -> list[Run]:
    """An arm a setting of the learning rates."""
    return [
        Run(
            "figure7", arm, seed, "skywork_moe_1p8b.pretrain_recipe",
            {"learning_rates": arm, "tokens": TOKENS, "decay_tokens": DECAY_TOKENS, "similarity_interval": 100},
        )
        for arm in LABELS
    ]  # fmt: skip


def page(found: Results) -> Page:
    """The curves as in the report, and its readings beside ours before and after the last decay."""
    figure, axes = pictures.grid(1, 3, width=4.0)
    pictures.lines(axes[0, 0], found, LABELS, pictures.train_loss, "Training loss")
    axes[0, 0].legend()
    for place, (when, value) in enumerate((("Before", before), ("After", lambda run: run.loss))):
        gaps = [
            paired([value(run) for run in found[arm]], [value(run) for run in found["baseline"]])
            for arm in LABELS
        ]
        report = [REPORT[arm][place] - REPORT["baseline"][place] for arm in LABELS]
        title = f"{when} the decay to zero: loss minus baseline's"
        pictures.against(axes[0, place + 1], list(LABELS), report, gaps, title)
    axes[0, 1].legend()
    rows = []
    for arm, runs in found.items():
        cells: list[object] = [LABELS[arm]]
        for place, value in enumerate((before, lambda run: run.loss)):
            values = [value(run) for run in runs]
            gap = "" if arm == "baseline" else paired(values, [value(run) for run in found["baseline"]])
            cells += [pictures.mean_and_spread(values), gap, REPORT[arm][place]]
        rows.append(cells)
    columns = ("learning rate", "before the decay to zero (training loss)", "minus baseline", "report",
               "after it (held out)", "minus baseline", "report")  # fmt: skip
    return Page(figure, pictures.table(columns, rows))


def before(run: Result) -> float:
    """Training loss where the rate has fallen to a tenth: the mean of the ten logged steps up to there."""
    curve, end = run.curves["reduced_train_loss"], run.facts["steps"] * TOKENS / (TOKENS + DECAY_TOKENS)
    return float(curve.values[curve.steps <= end][-10:].mean())


def claims(found: Results) -> list[Claim]:
    """Smaller rates lead before the last decay, and lead no more after it."""
    made = []
    for arm in list(LABELS)[1:]:
        statement = f"before the decay to zero: loss at {LABELS[arm]} minus at {LABELS['baseline']}"
        ours = paired([before(run) for run in found[arm]], [before(run) for run in found["baseline"]])
        made.append(signed("app. C.1, Fig. 7", statement, REPORT[arm][0] - REPORT["baseline"][0], ours))
    for arm in list(LABELS)[1:]:
        statement = f"after it: loss at {LABELS[arm]} equals that at {LABELS['baseline']}"
        made.append(
            equal(
                "app. C.1, Fig. 7",
                statement,
                0.0,
                paired(losses(found[arm]), losses(found["baseline"])),
                0.01,
            )
        )
    return made


FIGURE = Figure("figure7", "Figure 7 in miniature: the experts' learning rate", runs, page, claims)

if __name__ == "__main__":
    main(FIGURE)
