"""The figures' runs and pages, without training."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.paper import command, defaults, figure2, figure3, figure4, figures
from benchmarks.paper.claim import CONTRADICTED, HOLDS
from benchmarks.paper.command import Figure
from benchmarks.paper.results import Result
from benchmarks.paper.runs import BUDGETS, Run, Start, Workshop
from nemo_skymoe.report.curves import Curve
from tests.cases import every
from tests.recipes.factories import leaves

FIGURES = {figure.name: figure for figure in figures.FIGURES}
ALL = every("figure", FIGURES.values(), ids=FIGURES)


def differences(workshop: Workshop, run: Run, other: Run) -> set[str]:
    """Paths at which two runs' recipes differ, beside their names."""
    starts = [None if each.start is None else Path("start") for each in (run, other)]
    found = [
        dict(leaves(workshop.recipe(each, start))) for each, start in zip((run, other), starts, strict=True)
    ]
    named = ("log.name", "log.tensorboard.name", "log.log_dir")
    return {
        path
        for path in found[0].keys() | found[1].keys()
        if found[0].get(path) != found[1].get(path) and path not in named
    }


@pytest.fixture
def workshop(tmp_path: Path) -> Workshop:
    return Workshop(BUDGETS["full"], tmp_path, tmp_path / "results")


@ALL
def test_seeds_differ_in_nothing_but_seeds(figure: Figure, workshop: Workshop) -> None:
    for first, second in zip(figure.runs(1), figure.runs(2), strict=True):
        assert differences(workshop, first, second) == {"data.seed"}
        assert replace(second, seed=1, start=None) == replace(first, start=None)


@ALL
def test_a_run_is_small(figure: Figure, workshop: Workshop) -> None:
    for run in figure.runs(1):
        recipe = workshop.recipe(run, None if run.start is None else Path("start"))
        tokens = recipe.trainer.max_steps * recipe.data.seq_length * recipe.data.global_batch_size
        assert 0.4e6 < tokens <= 3.01e6
        assert recipe.trainer.devices == run.ranks
        assert recipe.optim.lr_scheduler.warmup_steps < recipe.trainer.max_steps / 5


@every(
    ("figure", "reference", "expected"),
    [
        (figure3.FIGURE, "off", {"moe_router_logit_norm_scale"}),
        (figure4.FIGURE, "adaptive", {"moe_adaptive_aux_loss", "moe_aux_loss_coeff"}),
    ],
)
def test_arms_differ_in_what_is_asked(
    figure: Figure, reference: str, expected: set[str], workshop: Workshop
) -> None:
    runs = {run.arm: run for run in figure.runs(1)}
    for arm, run in runs.items():
        found = differences(workshop, run, runs[reference])
        assert found <= {f"model.config.{option}" for option in expected}
        assert bool(found) == (arm != reference)


def test_defaults_ask_one_question_each(workshop: Workshop) -> None:
    runs = {run.arm: run for run in defaults.runs(1)}
    for arm, options in defaults.CONFIG.items():
        reference = runs["1"] if defaults.REFERENCE[arm] == arm else runs[defaults.REFERENCE[arm]]
        two_ranks = set(defaults._TWO_RANKS) if run_on_two(runs[arm]) and not run_on_two(reference) else set()
        changed = {f"model.config.{option}" for option in options}
        assert differences(workshop, runs[arm], reference) == changed | two_ranks


def run_on_two(run: Run) -> bool:
    return run.ranks == 2


def sources(start: Start | None) -> Iterator[Run]:
    """Every run that a start needs, and what those need."""
    for run, share in () if start is None else start.sources.values():
        assert 0 < share <= 1
        yield from sources(run.start)
        yield run


def test_a_run_comes_after_what_it_starts_from() -> None:
    seen = {("figure1", "dense_seed1")}
    for figure in FIGURES.values():
        for run in figure.runs(1):
            assert all((each.figure, each.name) in seen for each in sources(run.start))
            seen.add((run.figure, run.name))


def invented(run: Run) -> Result:
    """Curves of the right shape."""
    steps = np.arange(10, 310, 10)
    generator = np.random.default_rng(run.seed)

    def curve(start: float, end: float) -> Curve:
        return Curve(steps, np.linspace(start, end, len(steps)) + generator.normal(0, 0.01, len(steps)))

    curves = {
        "reduced_train_loss": curve(7, 4),
        "val_loss": Curve(steps[[14, 29]], curve(5, 4).values[[14, 29]]),
    }
    for layer in range(1, 5):
        for metric in (
            "drop_rate", "max1_over_max2", "max2_over_max3", "aux_loss_coefficient", "expert_similarity"
        ):  # fmt: skip
            curves[f"moe/{metric}_layer_{layer}"] = curve(1, 0.5)
    facts = {"steps": 300, "tokens_per_step": 2048, "seconds": 60, "seed": run.seed, "budget": "full"}
    return Result(facts, curves)


@pytest.mark.parametrize("seeds", [1, 3])
@ALL
def test_a_page_is_drawn_from_any_number_of_seeds(
    figure: Figure, seeds: int, workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figure2, "_gates", lambda *_: np.linspace(0.2, 0.01, 16))
    found: dict[str, list[Result]] = {}
    for seed in range(1, seeds + 1):
        for run in figure.runs(seed):
            found.setdefault(run.arm, []).append(invented(run))
    page = command.write(figure, workshop, found).read_text()
    claims = figure.claims(found)
    assert claims and (seeds > 1 or not {claim.verdict for claim in claims} & {HOLDS, CONTRADICTED})
    assert f"seeds {', '.join(map(str, range(1, seeds + 1)))}." in page and "nan" not in page
    assert (workshop.results / f"{figure.name}.png").read_bytes().startswith(b"\x89PNG")


def test_processes_train_a_run_once(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    run, trained = figure3.runs(1)[0], []

    def train(self: Workshop, run: Run, _: object) -> None:
        trained.append(run)
        time.sleep(0.2)
        self.csv(run).parent.mkdir(parents=True)
        self.csv(run).write_text('# {"seed": 1}\nstep,val_loss\n1,2.0\n')

    monkeypatch.setattr(Workshop, "_train", train)
    with ThreadPoolExecutor(2) as threads:
        results = list(threads.map(workshop.carry_out, [run] * 2))
    assert trained == [run] and [result.loss for result in results] == [2.0, 2.0]


def test_seeds_without_every_arm_are_left_out(workshop: Workshop) -> None:
    figure = figure3.FIGURE
    for run in (*figure.runs(1), *figure.runs(2)[1:], *figure.runs(3)):
        file = workshop.csv(run)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f'# {{"seed": {run.seed}}}\nstep,val_loss\n1,2.0\n')
    found = command.collected(figure, workshop)
    assert {arm: [run.facts["seed"] for run in runs] for arm, runs in found.items()} == {
        arm: [1, 3] for arm in figure3.LABELS
    }
