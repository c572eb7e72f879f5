"""The command of every figure: carry out what is missing, then draw and describe what is there."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.paper.claim import Claim
from benchmarks.paper.results import Result
from benchmarks.paper.runs import BUDGETS, Run, Workshop

HERE = Path(__file__).parent
Results = Mapping[str, Sequence[Result]]
"""Of every arm, a run a seed, the same seeds in the same order."""


@dataclass(frozen=True)
class Page:
    """The results of a figure: a picture, and lines of Markdown."""

    picture: Any
    lines: Sequence[str]


@dataclass(frozen=True)
class Figure:
    """A figure of the report: its runs at one seed, in their order, and the page of all of them."""

    name: str
    title: str
    runs: Callable[[int], Sequence[Run]]
    page: Callable[[Results], Page]
    claims: Callable[[Results], Sequence[Claim]]
    """Of the report, or, of `defaults`, ours, with what was found."""
    after: Callable[[Workshop, Run], None] | None = None
    """Called after each run, for what curves do not hold."""


def main(figure: Figure, arguments: Sequence[str] | None = None) -> None:
    """`python -m benchmarks.paper.figureN`."""
    parser = argparse.ArgumentParser(description=figure.title)
    parser.add_argument("--budget", choices=BUDGETS, default="short")
    parser.add_argument("--seeds", type=int, nargs="+", help="instead of the budget's")
    parser.add_argument("--arms", nargs="+", help="only these, and what they start from")
    parser.add_argument("--draw", action="store_true", help="train nothing, draw what is there")
    given = parser.parse_args(arguments)
    workshop = place(given.budget)
    seeds = given.seeds or range(1, workshop.budget.seeds + 1)
    if not given.draw:
        for seed in seeds:
            for run in figure.runs(seed):
                if given.arms is None or run.arm in given.arms:
                    workshop.carry_out(run)
                    if figure.after is not None:
                        figure.after(workshop, run)
    found = collected(figure, workshop)
    if found:
        print(write(figure, workshop, found))


def place(budget: str) -> Workshop:
    """Return the folder of the results: beside this file for the curves of the full budget, else under `runs/paper`."""
    folder = Path("runs/paper") / budget
    return Workshop(BUDGETS[budget], folder, HERE / "results" if budget == "full" else folder / "results")


def collected(figure: Figure, workshop: Workshop) -> dict[str, list[Result]]:
    """Every arm's results at the seeds for which all arms are there: pairs need both."""
    from benchmarks.paper import results

    seeds = [seed for seed in range(1, 100) if all(workshop.csv(run).is_file() for run in figure.runs(seed))]
    found: dict[str, list[Result]] = {}
    for seed in seeds:
        for run in figure.runs(seed):
            found.setdefault(run.arm, []).append(results.read(workshop.csv(run)))
    return found


def write(figure: Figure, workshop: Workshop, found: Results) -> Path:
    """The page, as FIGURE.md and FIGURE.png."""
    from nemo_skymoe.report import drawing

    with drawing.style():
        page = figure.page(found)
        picture = drawing.png(page.picture)
    workshop.results.mkdir(parents=True, exist_ok=True)
    (workshop.results / f"{figure.name}.png").write_bytes(picture)
    output = workshop.results / f"{figure.name}.md"
    output.write_text("\n".join([f"# {figure.title}", "", *_facts(figure, workshop, found), *page.lines, ""]))
    return output


def _facts(figure: Figure, workshop: Workshop, found: Results) -> list[str]:
    runs = [result for arm in found.values() for result in arm]
    tokens = sorted({f"{run.facts['steps'] * run.tokens_per_step / 1e6:.2f}" for run in runs}, key=float)
    amount = tokens[0] if len(tokens) == 1 else f"{tokens[0]} to {tokens[-1]}"
    seeds = sorted({run.facts["seed"] for run in runs})
    return [
        f"`python -m benchmarks.paper.{figure.name} --budget {workshop.budget.name}`: {len(runs)} runs at"
        f" `scale=miniature` of {amount}M tokens, seeds {', '.join(map(str, seeds))}."
        " Losses are on held-out text, nats a token. ± is half the 95% confidence"
        " interval of the paired differences (Student's t over the seeds).",
        "",
        f"![{figure.title}]({figure.name}.png)",
        "",
    ]
