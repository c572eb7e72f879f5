"""One training of a miniature: a recipe's own factory at `scale=miniature`, its curves kept as one CSV file.

The unit of work is a run: its CSV appears when it has ended, and a run whose CSV is there is not repeated.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from filelock import FileLock

from benchmarks.paper import results, text
from nemo_skymoe.checkpoint.upcycling.options import Upcycling

HELD_OUT = 0.03
"""Share of each domain's documents."""
SAVED_SHARE = 1 / 6
"""Of a dense run between two checkpoints: those after a third and at the end are upcycled."""
VALIDATIONS = 2


@dataclass(frozen=True)
class Budget:
    """The share of a run's tokens that are trained on, and the number of seeds."""

    name: str
    share: float
    seeds: int


BUDGETS = {"short": Budget("short", 0.05, 1), "full": Budget("full", 1.0, 3)}


@dataclass(frozen=True)
class Start:
    """Checkpoints of other runs, after a share of their tokens, upcycled; without `upcycling` the one as it is."""

    sources: Mapping[str, tuple[Run, float]]
    upcycling: Upcycling | None = None


@dataclass(frozen=True)
class Run:
    """One arm at one seed.

    Args:
        factory: Of a recipe: module in `recipes` and function, as "skywork_300m.pretrain_recipe".
        arguments: Of the factory.
        settings: Put on what it returns, by path: {"model.config.moe_aux_loss_form": "square"}.
        seed: Of the initial weights, the order of the data and the upcycling: arms of one seed are paired.
    """

    figure: str
    arm: str
    seed: int
    factory: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    start: Start | None = None
    ranks: int = 1

    @property
    def name(self) -> str:
        """Return the name of the CSV and of the folder of checkpoints."""
        return f"{self.arm}_seed{self.seed}"


@dataclass(frozen=True)
class Workshop:
    """The folders of checkpoints and logs, and the folder of the curves."""

    budget: Budget
    folder: Path
    results: Path

    def csv(self, run: Run) -> Path:
        """The curves of a run."""
        return self.results / run.figure / f"{run.name}.csv"

    def carry_out(self, run: Run, say: Callable[[str], None] = print) -> results.Result:
        """Train, unless that was done, and return the curves."""
        with self._alone_with(run):
            if not self.csv(run).is_file():
                self._train(run, say)
        return results.read(self.csv(run))

    def checkpoint(self, run: Run, share: float, say: Callable[[str], None]) -> Path:
        """Return the checkpoint nearest to a share of a run's steps. The run is trained again if it is gone."""
        folder = self.folder / run.figure / run.name / "checkpoints"
        with self._alone_with(run):
            if not (any(folder.glob("*-last")) and self.csv(run).is_file()):
                self._train(run, say)
        steps = results.read(self.csv(run)).facts["steps"]
        saved = {
            1 + int(path.name.removeprefix("step=").partition("-")[0]): path for path in folder.iterdir()
        }
        return saved[min(saved, key=lambda step: abs(step - share * steps))]

    def recipe(self, run: Run, resume_path: Path | None) -> Any:
        """The recipe that is trained."""
        recipe = _factory(run.factory)(
            dir=str(self.folder / run.figure),
            name=run.name,
            corpus=str(text.CORPUS),
            scale="miniature",
            mixture=run.arguments.get("mixture", text.MIXTURE),
            **({} if resume_path is None else {"resume_path": str(resume_path)}),
            **{name: value for name, value in run.arguments.items() if name != "mixture"},
        )
        recipe.data.held_out, recipe.data.seed = HELD_OUT, run.seed
        _shorten(recipe, self.budget.share)
        for path, value in run.settings.items():
            _set(recipe, path, value)
        return recipe

    def _alone_with(self, run: Run) -> FileLock:
        """While another process trains it, wait: figures share the dense runs."""
        folder = self.folder / run.figure
        folder.mkdir(parents=True, exist_ok=True)
        return FileLock(folder / f"{run.name}.lock")

    def _train(self, run: Run, say: Callable[[str], None]) -> None:
        from nemo_skymoe.ranks import run_ranks

        text.build()
        shutil.rmtree(self.folder / run.figure / run.name, ignore_errors=True)
        shutil.rmtree(self.folder / run.figure / "tensorboard" / run.name, ignore_errors=True)
        resume = None if run.start is None else self._start(run, say)
        recipe = self.recipe(run, resume)
        log = self.folder / "logs" / run.figure / f"{run.name}.log"
        say(f"{run.figure} {run.name}: {recipe.trainer.max_steps} steps")
        begin = time.monotonic()
        run_ranks(_child, run.ranks, recipe, run.seed, timeout=3600, log=log)
        facts = {
            "figure": run.figure,
            "arm": run.arm,
            "seed": run.seed,
            "budget": self.budget.name,
            "steps": recipe.trainer.max_steps,
            "tokens_per_step": recipe.data.seq_length * recipe.data.global_batch_size,
            "seconds": round(time.monotonic() - begin),
            "corpus": text.fingerprint(),
            **results.versions(),
        }
        results.write(self.csv(run), facts, self.folder / run.figure / "tensorboard" / run.name)
        say(f"{run.figure} {run.name}: {facts['seconds']} s")

    def _start(self, run: Run, say: Callable[[str], None]) -> Path:
        from nemo_skymoe.ranks import run_ranks

        assert run.start is not None
        sources = {
            name: self.checkpoint(source, share, say) for name, (source, share) in run.start.sources.items()
        }
        if run.start.upcycling is None:
            (checkpoint,) = sources.values()
            return checkpoint
        output = self.folder / run.figure / run.name / "start"
        if not output.is_dir():
            log = self.folder / "logs" / run.figure / f"{run.name}_start.log"
            run_ranks(_upcycle, 1, sources, run.start.upcycling, output, log=log)
        return output


def _child(recipe: Any, seed: int) -> None:
    import nemo_run as run

    from nemo_skymoe.demo.phases import train
    from nemo_skymoe.nemo.seed import InitialSeed

    recipe.trainer.callbacks.append(run.Config(InitialSeed, seed=seed))
    train("nemo", recipe, recipe.log.name)


def _upcycle(sources: Mapping[str, Path], upcycling: Upcycling, output: Path) -> None:
    from nemo_skymoe.checkpoint import convert
    from nemo_skymoe.checkpoint.sources import open_source

    opened = {name: open_source(folder) for name, folder in sources.items()}
    convert.plan(opened, convert.TargetOptions("nemo"), upcycling).run(output)


@cache
def _factory(name: str) -> Callable[..., Any]:
    from importlib import import_module

    module, _, function = name.partition(".")
    return getattr(import_module(f"nemo_skymoe.recipes.{module}"), function)


def _shorten(recipe: Any, share: float) -> None:
    """Train on a share of the tokens; the schedule keeps its shape."""
    trainer, schedule = recipe.trainer, recipe.optim.lr_scheduler
    trainer.max_steps = max(10, round(trainer.max_steps * share))
    trainer.val_check_interval = -(-trainer.max_steps // VALIDATIONS)
    trainer.log_every_n_steps = max(1, min(trainer.log_every_n_steps, trainer.max_steps // 20))
    schedule.max_steps = trainer.max_steps
    schedule.warmup_steps = min(schedule.warmup_steps, trainer.max_steps // 4)
    schedule.decay_steps = round(schedule.decay_steps * share)
    every = (
        trainer.max_steps
        if recipe.log.ckpt.save_top_k == 1
        else max(1, round(trainer.max_steps * SAVED_SHARE))
    )
    recipe.log.ckpt.every_n_train_steps = every


def _set(recipe: Any, path: str, value: Any) -> None:
    *parents, name = path.split(".")
    for parent in parents:
        recipe = getattr(recipe, parent)
    setattr(recipe, name, value)
