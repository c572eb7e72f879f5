"""Figure 3 (section 4.1): gating-logit normalisation off and at lambda 0.5, 1, 2, on 16 experts.

python -m benchmarks.paper.figure3 --budget full
"""

from __future__ import annotations

import numpy as np

from benchmarks.paper import pictures
from benchmarks.paper.claim import Claim, signed
from benchmarks.paper.command import Figure, Page, Results, main
from benchmarks.paper.gates import record
from benchmarks.paper.results import losses, paired
from benchmarks.paper.runs import Run

LABELS = {"off": "off", "0.5": "λ = 0.5", "1": "λ = 1", "2": "λ = 2"}
REPORT = {
    "off": {"loss": 2.357, "drop_rate": 0.022, "max1_over_max2": 1.0, "max2_over_max3": 1.0},
    "0.5": {"loss": 2.345, "drop_rate": 0.0105, "max1_over_max2": 1.57, "max2_over_max3": 1.12},
    "1": {"loss": 2.338, "drop_rate": 0.011, "max1_over_max2": 3.1, "max2_over_max3": 1.44},
    "2": {"loss": 2.336, "drop_rate": 0.0165, "max1_over_max2": 5.6, "max2_over_max3": 1.77},
}
"""Read off the report's figure at 75B tokens."""
GATE = 3
"""The layer whose ratios the report shows."""


TITLES = {
    "drop_rate": "Token drop rate, mean of layers",
    "max1_over_max2": f"Max1 / Max2, layer {GATE}",
    "max2_over_max3": f"Max2 / Max3, layer {GATE}",
}


def runs(seed: int) -> list[Run]:
    """An arm a lambda."""
    return [
        Run(
            "figure3", arm, seed, "skywork_moe_2p5b.pretrain_recipe",
            {"normalisation": arm, "similarity_interval": 50},
        )
        for arm in LABELS
    ]  # fmt: skip


def page(found: Results) -> Page:
    """Four panels as in the report, and below them its readings beside ours."""
    figure, axes = pictures.grid(2, 4)
    metrics = (("drop_rate", None), ("max1_over_max2", GATE), ("max2_over_max3", GATE))
    pictures.lines(axes[0, 0], found, LABELS, pictures.train_loss, "Training loss")
    for place, (metric, layer) in enumerate(metrics, start=1):
        pictures.lines(axes[0, place], found, LABELS, pictures.router(metric, layer), TITLES[metric])
    pictures.key(figure, axes[0, 0])
    names = list(LABELS)
    gaps = [paired(losses(found[arm]), losses(found["off"])) for arm in names]
    report = [REPORT[arm]["loss"] - REPORT["off"]["loss"] for arm in names]
    pictures.against(axes[1, 0], names, report, gaps, "Loss minus loss of off")
    for place, (metric, _) in enumerate(metrics, start=1):
        ends = [_ends(found, metric, arm) for arm in names]
        spread = [pictures.spread(end) for end in ends]
        report = [REPORT[arm][metric] for arm in names]
        pictures.beside(
            axes[1, place], names, report, [float(np.mean(end)) for end in ends], spread, "at the end"
        )
    axes[1, 0].legend()
    return Page(figure, _lines(found))


def _lines(found: Results) -> list[str]:
    columns = (
        "λ", "loss", "minus off", "report", "drop rate", "report", "Max1/Max2", "report", "Max2/Max3", "report",
    )  # fmt: skip
    rows = []
    for arm, runs in found.items():
        read = REPORT[arm]
        gap = "" if arm == "off" else str(paired(losses(runs), losses(found["off"])))
        rows.append([
            arm, pictures.mean_and_spread(losses(runs)), gap, f"{read['loss'] - 2.357:+.3f}",
            pictures.mean_and_spread([run.at_end("drop_rate") for run in runs]), read["drop_rate"],
            *(cell for metric in ("max1_over_max2", "max2_over_max3") for cell in (
                pictures.mean_and_spread([run.at_end(metric, GATE) for run in runs], 2), read[metric])),
        ])  # fmt: skip
    return pictures.table(columns, rows)


def claims(found: Results) -> list[Claim]:
    """Lower losses and drop rates with normalisation, sharper gates with a larger lambda."""
    place, made = "sec. 4.1, Fig. 3", []
    for metric, name in (("loss", "loss"), ("drop_rate", "drop rate")):
        for arm in list(LABELS)[1:]:
            ours = paired(_ends(found, metric, arm), _ends(found, metric, "off"))
            published = REPORT[arm][metric] - REPORT["off"][metric]
            made.append(signed(place, f"{name}, {LABELS[arm]} minus off", published, ours))
    for metric in ("max1_over_max2", "max2_over_max3"):
        for less, more in (("off", "0.5"), ("0.5", "1"), ("1", "2")):
            ours = paired(_ends(found, metric, more), _ends(found, metric, less))
            name = f"{TITLES[metric]}, {LABELS[more]} minus {LABELS[less]}"
            made.append(signed(place, name, REPORT[more][metric] - REPORT[less][metric], ours))
    return made


def _ends(found: Results, metric: str, arm: str) -> list[float]:
    if metric == "loss":
        return losses(found[arm])
    return [run.at_end(metric, None if metric == "drop_rate" else GATE) for run in found[arm]]


FIGURE = Figure(
    "figure3", "Figure 3 in miniature: normalisation of the gating logits", runs, page, claims, after=record
)

if __name__ == "__main__":
    main(FIGURE)
