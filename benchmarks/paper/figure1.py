"""Figure 1 (section 3): upcycling against training from scratch under two budgets, and expert similarity.

python -m benchmarks.paper.figure1 --budget full
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np

from benchmarks.paper import pictures
from benchmarks.paper.claim import Claim, equal, signed
from benchmarks.paper.command import Figure, Page, Results, main
from benchmarks.paper.results import Result, losses, paired
from benchmarks.paper.runs import Run, Start
from nemo_skymoe.checkpoint.upcycling.options import Upcycling

STARTS = {
    "scratch": "scratch",
    "100b": "from 1/3 of the dense run",
    "300b": "from its end, constant rate",
    "300b_high_lr": "from its end, 4x the rate",
}
SHARE = {"100b": 1 / 3, "300b": 1.0, "300b_high_lr": 1.0}
BUDGETS = {"100b": "2/3 of the dense run's cost", "300b": "twice its cost"}
SIMILARITY = {"scratch": 0.0, "100b": 0.075, "300b": 0.23, "300b_high_lr": 0.15}
"""Expert similarity at the end of the longer budget, read off the report's figure."""
_BEGINNING = 5
"""Logged losses from scratch that a picture leaves out: they would flatten the rest."""
REPORT = {
    "100b": {"scratch": 2.265, "100b": 2.258, "300b": 2.285},
    "300b": {"scratch": 2.20, "300b_high_lr": 2.228, "100b": 2.235, "300b": 2.248},
}
"""Final losses, read off the report's figure."""
_WHY = (
    "The scales differ in more than size: at its end the report's dense model has seen 1000 tokens a parameter, the"
    " miniature 6.5. What a checkpoint is worth is asked here far from saturation; that this is the reason was not tested."
)


def dense(seed: int) -> Run:
    """The dense model that is upcycled, here and in Figures 4 and 8: at this scale they are of one size."""
    return Run("figure1", "dense", seed, "skywork_300m.pretrain_recipe")


def start(seed: int, share: float, experts: int = 8) -> Start:
    """`experts` copies of the dense model after a share of its tokens."""
    return Start({"base": (dense(seed), share)}, Upcycling(experts, 2, seed=seed))


def runs(seed: int) -> list[Run]:
    """The dense run, and the MoEs of each budget."""
    return [
        dense(seed),
        *(
            Run(
                "figure1",
                _arm(budget, name),
                seed,
                "skywork_300m.moe_pretrain_recipe",
                {"start": name, "budget": budget, "similarity_interval": 20},
                start=None if name == "scratch" else start(seed, SHARE[name]),
            )
            for budget, read in REPORT.items()
            for name in STARTS
            if name in read
        ),
    ]


def _arm(budget: str, name: str) -> str:
    return f"moe_{budget}_{name}"


def page(found: Results) -> Page:
    """Left and middle the loss of each budget, right the similarity of the longer one; below, readings beside ours."""
    figure, axes = pictures.grid(2, 3, width=4.2)
    for place, (budget, meaning) in enumerate(BUDGETS.items()):
        arms = _of(found, budget)
        pictures.lines(axes[0, place], arms, STARTS, pictures.train_loss, f"Training loss, {meaning}")
        axes[0, place].set_ylim(top=pictures.train_loss(arms["scratch"][0]).values[_BEGINNING])
        names = [name for name in STARTS if name in REPORT[budget]]
        gaps = [paired(losses(arms[name]), losses(arms["scratch"])) for name in names]
        pictures.against(
            axes[1, place],
            [_short(name) for name in names],
            [REPORT[budget][name] - REPORT[budget]["scratch"] for name in names],
            gaps,
            "Final loss minus that from scratch",
        )
    long = _of(found, "300b")
    pictures.lines(
        axes[0, 2], long, STARTS, lambda run: run.mean_curve("expert_similarity"), "Expert similarity"
    )
    pictures.key(figure, axes[0, 1])
    axes[1, 0].legend()
    ends = [_similarities(runs) for runs in long.values()]
    pictures.beside(
        axes[1, 2],
        [_short(name) for name in long],
        [SIMILARITY[name] for name in long],
        [float(np.mean(end)) for end in ends],
        [pictures.spread(end) for end in ends],
        "at the end",
    )
    return Page(figure, _lines(found))


def _short(name: str) -> str:
    return name.replace("_high_lr", " 4x")


def _lines(found: Results) -> list[str]:
    rows: list[Sequence[object]] = [
        ("dense", "", pictures.mean_and_spread(losses(found["dense"])), "", 2.44, "", "")
    ]
    for budget, meaning in BUDGETS.items():
        arms = _of(found, budget)
        for name, runs in arms.items():
            gap = paired(losses(runs), losses(arms["scratch"]))
            end = pictures.mean_and_spread(_similarities(runs), 3)
            report = REPORT[budget][name]
            rows.append((
                STARTS[name], meaning, pictures.mean_and_spread(losses(runs)), "" if name == "scratch" else gap,
                report, f"{report - REPORT[budget]['scratch']:+.3f}", end,
            ))  # fmt: skip
    columns = ("MoE", "budget", "loss", "minus scratch", "report", "minus scratch", "similarity at the end")
    return [*pictures.table(columns, rows), "", *_orders(found), "", *_crossings(found)]


def _similarities(runs: Sequence[Result]) -> list[float]:
    return [float(run.mean_curve("expert_similarity").values[-1]) for run in runs]


def _orders(found: Results) -> list[str]:
    """Under each budget the models from the lowest loss on; a `<` stands where the seeds decide."""
    lines = [
        "The report's rule for a dense model that exists: upcycle where the MoE's training costs much less than the dense"
        " model's did, train from scratch where it costs twice as much or more. Here, from the lowest loss to the"
        " highest (`<` where the interval of the paired difference excludes zero, `~` where it does not):",
        "",
    ]
    for budget, meaning in BUDGETS.items():
        arms = _of(found, budget)
        names = sorted(arms, key=lambda name: float(np.mean(losses(arms[name]))))
        order = STARTS[names[0]]
        for better, worse in pairwise(names):
            decided = paired(losses(arms[worse]), losses(arms[better])).verdict != "undecided"
            order += f" {'<' if decided else '~'} {STARTS[worse]}"
        lines.append(f"- {meaning}: {order}.")
    return [*lines, "", _WHY]


def _crossings(found: Results) -> list[str]:
    """Return where scratch's training loss falls below that of each upcycled model for good."""
    arms = _of(found, "300b")
    lines = [
        "Where, under the longer budget, the smoothed training loss from scratch becomes the lower one for good"
        " (tokens, by seed):",
        "",
    ]
    for name, runs in arms.items():
        if name == "scratch":
            continue
        tokens = [_crossing(scratch, run) for scratch, run in zip(arms["scratch"], runs, strict=True)]
        where = ", ".join("never" if token is None else f"{token:.2f}M" for token in tokens)
        lines.append(f"- against '{STARTS[name]}': {where}.")
    return lines


def _crossing(scratch: Result, other: Result) -> float | None:
    below = pictures.train_loss(scratch).values < pictures.train_loss(other).values
    if not below[-1]:
        return None
    first = int(np.flatnonzero(~below)[-1]) + 1 if not below.all() else 0
    return float(pictures.train_loss(scratch).steps[first]) * scratch.tokens_per_step / pictures.MILLION


def _of(found: Results, budget: str) -> Mapping[str, Sequence[Result]]:
    return {name: found[_arm(budget, name)] for name in STARTS if name in REPORT[budget]}


def claims(found: Results) -> list[Claim]:
    """The orders of the final losses under both budgets, and of the similarities."""
    made = []
    for budget, meaning in BUDGETS.items():
        arms = _of(found, budget)
        for name in [name for name in arms if name != "scratch"]:
            published = REPORT[budget][name] - REPORT[budget]["scratch"]
            ours = paired(losses(arms[name]), losses(arms["scratch"]))
            statement = f"{meaning}: loss {STARTS[name]}, minus from scratch"
            made.append(signed("sec. 3, Fig. 1", statement, published, ours))
    long = {name: _similarities(runs) for name, runs in _of(found, "300b").items()}
    for name in ("300b", "300b_high_lr"):
        ours = paired(long[name], long["100b"])
        statement = f"expert similarity at the end {STARTS[name]}, minus {STARTS['100b']}"
        made.append(signed("Fig. 1", statement, SIMILARITY[name] - SIMILARITY["100b"], ours))
    scratch = paired(long["scratch"], [0.0] * len(long["scratch"]))
    return [*made, equal("Fig. 1", "expert similarity at the end from scratch", 0.0, scratch, 0.05)]


FIGURE = Figure(
    "figure1", "Figure 1 in miniature: upcycling against training from scratch", runs, page, claims
)

if __name__ == "__main__":
    main(FIGURE)
