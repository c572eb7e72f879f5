"""Figure 4 (section 4.2): coefficients that follow the drop rate, and, as the report does not, against fixed ones.

python -m benchmarks.paper.figure4 --budget full
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.paper import pictures
from benchmarks.paper.claim import UNDECIDED, Claim, signed
from benchmarks.paper.command import Figure, Page, Results, main
from benchmarks.paper.figure1 import start
from benchmarks.paper.results import Result, losses, paired
from benchmarks.paper.runs import Run
from nemo_skymoe.report import drawing

LABELS = {"adaptive": "adaptive", "fixed_1e-2": "fixed 1e-2", "fixed_1e-3": "fixed 1e-3"}
COEFFICIENTS = {"fixed_1e-2": 1e-2, "fixed_1e-3": 1e-3}
TOKENS = 150e9
"""Of the report's 1000B, as many as a run of a miniature may have."""
RATES = {"max_lr": 1.2e-3, "min_lr": 3e-4}
"""Those of Figure 1 for a start from the end of the dense run: the 146B model's would not move one this small."""

REPORT = {"drop_rate": (0.017, 0.002, 0.008), "aux_loss_coefficient": (0.0034, 0.0004, 0.0016)}
"""Layer 1, and the range of the bulk of the layers, read off the report's figure at 1000B tokens."""


def runs(seed: int) -> list[Run]:
    """The 146B model's recipe from the upcycled dense run, with 16 experts."""
    return [
        Run(
            "figure4",
            arm,
            seed,
            "skywork_moe_146b.pretrain_recipe",
            {"tokens": TOKENS, "similarity_interval": 50, **RATES},
            {} if arm == "adaptive" else _fixed(COEFFICIENTS[arm]),
            start(seed, 1.0, experts=16),
        )
        for arm in LABELS
    ]


def _fixed(coefficient: float) -> dict[str, object]:
    return {
        "model.config.moe_adaptive_aux_loss": False,
        "model.config.moe_aux_loss_coeff": coefficient,
    }


def page(found: Results) -> Page:
    """Draw drop rate and coefficient by layer for one seed, as the report does, and the three arms beside them."""
    figure, axes = pictures.grid(2, 2, width=4.2)
    run = found["adaptive"][0]
    shades = drawing.layer_colours(run.by_layer("drop_rate"))
    for axis, (metric, title) in zip(
        axes[0],
        (("drop_rate", "Drop rate by layer, adaptive"), ("aux_loss_coefficient", "Coefficient by layer")),
        strict=True,
    ):
        for layer, curve in run.by_layer(metric).items():
            curve = curve.smoothed(0.1) if metric == "drop_rate" else curve
            tokens = curve.steps * run.tokens_per_step / pictures.MILLION
            axis.plot(tokens, curve.values, color=shades[layer], linewidth=1.3, label=f"layer {layer}")
        _mark_report(axis, metric, 1.04 * run.facts["steps"] * run.tokens_per_step / pictures.MILLION)
        axis.set_title(title)
        axis.set_xlabel("million tokens")
    axes[0, 0].legend()
    pictures.lines(
        axes[1, 0], found, LABELS, pictures.behind(found["adaptive"]), "Training loss minus adaptive's"
    )
    pictures.lines(axes[1, 1], found, LABELS, pictures.router("drop_rate"), "Drop rate, mean of layers")
    axes[1, 0].legend()
    return Page(figure, _lines(found))


def _mark_report(axis: Any, metric: str, place: float) -> None:
    first, low, high = REPORT[metric]
    axis.plot(place, first, "D", color=drawing.GREY, markerfacecolor="none", label="report, layer 1")
    axis.vlines(place, low, high, color=drawing.GREY, linewidth=3, label="report, bulk")


def _lines(found: Results) -> list[str]:
    rows = []
    for arm, runs in found.items():
        drops = [run.at_end("drop_rate") for run in runs]
        rows.append((
            LABELS[arm], pictures.mean_and_spread(losses(runs)),
            "" if arm == "adaptive" else paired(losses(runs), losses(found["adaptive"])),
            pictures.mean_and_spread(drops),
            "" if arm == "adaptive" else paired(drops, [run.at_end("drop_rate") for run in found["adaptive"]]),
            ", ".join(f"{_coefficient(runs, arm, layer):.4f}" for layer in runs[0].by_layer("drop_rate")),
        ))  # fmt: skip
    columns = (
        "coefficient",
        "loss",
        "minus adaptive",
        "drop rate",
        "minus adaptive",
        "coefficient at the end, layers 1, 2, ...",
    )
    report = (
        "The report (Figure 4, 146B, read at 1000B tokens): layer 1 drops .017 at a coefficient of .0034, the bulk of the"
        " layers .002 to .008 at .0004 to .0016; both start near .05 and .01. It has no fixed coefficient to compare with."
    )
    return [*pictures.table(columns, rows), "", report]


def _coefficient(runs: Sequence[Result], arm: str, layer: int) -> float:
    if arm in COEFFICIENTS:
        return COEFFICIENTS[arm]
    return float(np.mean([run.by_layer("aux_loss_coefficient")[layer].values[-1] for run in runs]))


def claims(found: Results) -> list[Claim]:
    """Coefficients that have settled at a fifth of the drop rate, the first layer highest; and the ablation."""
    adaptive, place = found["adaptive"], "sec. 4.2, Fig. 4"
    first, rest = (
        [float(np.mean([run.at_end("drop_rate", layer) for layer in layers])) for run in adaptive]
        for layers in ((1,), range(2, adaptive[0].layers + 1))
    )
    made = [
        signed(place, "drop rate at the end, first layer minus the mean of the others", 0.017 - 0.005, paired(first, rest)),
        signed(
            place, "drop rate, end minus first tenth, mean of layers", 0.01 - 0.05,
            paired([run.at_end("drop_rate") for run in adaptive], [_beginning(run) for run in adaptive]),
        ),
    ]  # fmt: skip
    for arm in COEFFICIENTS:
        ours = paired(losses(adaptive), losses(found[arm]))
        verdict = {"lower": "adaptive wins", "higher": "fixed wins"}.get(ours.verdict, UNDECIDED)
        statement = f"loss, adaptive minus {LABELS[arm]} (ours, not the report's)"
        made.append(Claim(place, statement, "not published", str(ours), verdict))
    return made


def _beginning(run: Result) -> float:
    curve = run.mean_curve("drop_rate")
    return float(np.mean(curve.values[curve.steps <= 0.1 * run.facts["steps"]]))


FIGURE = Figure(
    "figure4", "Figure 4 in miniature: adaptive and fixed auxiliary-loss coefficients", runs, page, claims
)

if __name__ == "__main__":
    main(FIGURE)
