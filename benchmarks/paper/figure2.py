"""Figure 2 (section 4.1): the gate's distribution without and with normalisation, of the models of Figure 3.

python -m benchmarks.paper.figure2 --budget full
"""

from __future__ import annotations

import csv
from collections.abc import Sequence

import numpy as np

from benchmarks.paper import figure3, pictures
from benchmarks.paper.claim import Claim, signed
from benchmarks.paper.command import Figure, Page, Results, main, place
from benchmarks.paper.figure3 import GATE
from benchmarks.paper.gates import TOKENS, gates_csv, record
from benchmarks.paper.results import paired
from benchmarks.paper.runs import Run

LABELS = {"off": "without normalisation", "1": "λ = 1"}
REPORT = {"off": (0.100, 0.035, 1.17), "1": (0.29, 0.003, 1.90)}
"""Largest and smallest probability, and Max1 / Max2, read off the report's figure: one batch, one layer."""


def runs(seed: int) -> list[Run]:
    """Two arms of Figure 3."""
    return [run for run in figure3.runs(seed) if run.arm in LABELS]


def page(found: Results) -> Page:
    """Two panels as in the report: probability by rank."""
    figure, axes = pictures.grid(1, 2)
    rows = []
    for axis, (arm, label) in zip(axes[0], LABELS.items(), strict=True):
        seeds = [_gates(run.facts["budget"], arm, run.facts["seed"]) for run in found[arm]]
        mean = np.mean(seeds, axis=0)
        axis.bar(np.arange(1, len(mean) + 1), mean, color=pictures.colours(list(LABELS))[arm])
        largest, smallest, ratio = REPORT[arm]
        axis.plot(
            [1, len(mean)], [largest, smallest], "D", color="black", markerfacecolor="none", label="report"
        )
        axis.set_title(f"{label}, layer {GATE}")
        axis.set_xticks(range(1, len(mean) + 1, 3))
        axis.set_xlabel("expert, by its probability")
        axis.legend()
        rows.append(
            (label, f"{mean[0]:.3f}", largest, f"{mean[-1]:.4f}", smallest, f"{mean[0] / mean[1]:.2f}", ratio)
        )
    columns = ("gate", "largest", "report", "smallest", "report", "Max1/Max2 of the means", "report")
    note = f"Each token's probabilities, sorted, then averaged over {TOKENS} held-out tokens and the seeds."
    return Page(figure, [*pictures.table(columns, rows), "", note])


def _gates(budget: str, arm: str, seed: int) -> Sequence[float]:
    (run,) = (run for run in runs(seed) if run.arm == arm)
    with gates_csv(place(budget), run).open() as file:
        rows = {int(row.pop("layer")): list(map(float, row.values())) for row in csv.DictReader(file)}
    return rows[GATE]


def claims(found: Results) -> list[Claim]:
    """Normalisation makes the gate sharper."""
    (largest, _, _), (normalised, _, _) = REPORT["off"], REPORT["1"]
    ours = {
        arm: [_gates(run.facts["budget"], arm, run.facts["seed"])[0] for run in runs]
        for arm, runs in found.items()
    }
    statement = "a token's largest gate probability, λ = 1 minus without normalisation"
    return [signed("sec. 4.1, Fig. 2", statement, normalised - largest, paired(ours["1"], ours["off"]))]


FIGURE = Figure(
    "figure2", "Figure 2 in miniature: distribution of the gate", runs, page, claims, after=record
)

if __name__ == "__main__":
    main(FIGURE)
