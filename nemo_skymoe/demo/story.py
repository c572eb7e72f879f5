"""`make demo` trains a dense Skywork model on real text, upcycles it, and continues it as a Skywork-MoE."""

import multiprocessing
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from nemo_skymoe.checkpoint.run_folder import last_checkpoint
from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.demo.output import output_to
from nemo_skymoe.demo.record import SMOOTHING, Story, minutes
from nemo_skymoe.doctor import require_supported
from nemo_skymoe.ranks import run_ranks

RANKS = 2
STEPS, QUICK_STEPS = (120, 150), (20, 20)
"""Steps of the dense model, and of each of the two that follow it."""
PEAK_LR, FINAL_LR = 1.5e-3, 1.5e-4
"""Learning rates of the MoE and of the continued dense model alike. This is the one peak that there is time for, chosen
before comparing."""
_COSTS = {"dense": 1.0, "upcycling": 40.0, "moe": 2.0, "dense_continued": 1.0, "comparison": 30.0}
"""Time that the phases take in this order, per step or as a whole, in steps of the dense model. The time left follows
from them."""


def run(output: Path, quick: bool = False) -> Path:
    """Tell the whole story in `output`, and write its report. The runs of an earlier demo there are removed.

    Args:
        output: Folder for the corpus (kept from an earlier run), the runs and the report.
        quick: Whether every training takes 20 steps, which shows that it works and teaches the models nothing.

    Returns:
        The report's path.
    """
    require_supported(nemo=True)
    console = Console()
    story = Story(output.resolve(), *(QUICK_STEPS if quick else STEPS))
    _clear(story.output, console)
    console.print("[bold]Skywork-MoE on a laptop[/]: a dense model, upcycled and continued as an MoE")
    begin = time.monotonic()
    with _corpus(story, console):
        console.print("  NeMo is imported meanwhile, about 20 s; the third step shows the time left")
        with output_to(story.folder("logs") / "import.log"):
            from nemo_skymoe.demo import phases
            from nemo_skymoe.demo.summary import write
    story.seconds["corpus, import of NeMo"] = time.monotonic() - begin
    _dense(story, phases, console)
    _upcycle(story, phases, console)
    _continue(story, phases, console)
    report = write(story)
    console.print(
        f"\n{_verdict(story)}\nReport: [bold]{report}[/]  ({minutes(sum(story.seconds.values()))} in all)"
    )
    return report


def _clear(output: Path, console: Console) -> None:
    """Remove the runs of an earlier demo, and nothing else."""
    marker = output / ".skymoe-demo"
    if output.exists() and any(output.iterdir()) and not marker.exists():
        raise ConfigurationError(
            f"--output is '{output}', which holds other files: expected a new folder, or that of an earlier demo"
        )
    if (output / "report").exists():
        console.print(f"Replacing the earlier demo in {output}")
    for name in ("dense", "moe", "dense_continued", "upcycled", "tensorboard", "logs", "report"):
        shutil.rmtree(output / name, ignore_errors=True)
    output.mkdir(parents=True, exist_ok=True)
    marker.touch()


@contextmanager
def _corpus(story: Story, console: Console) -> Iterator[None]:
    """Build the corpus while the `with` block runs, which keeps one core busy."""

    def build() -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this process
        with output_to(story.folder("logs") / "corpus.log"):
            from nemo_skymoe.data.corpus import build_corpus
        with suppress(Exception):  # the second call below raises it
            build_corpus(
                story.folder("corpus"), progress=lambda line: console.print(f"  {line}", highlight=False)
            )

    console.print("[bold]Corpus[/]: the standard library of this Python")
    builder = multiprocessing.get_context("fork").Process(target=build, daemon=True)
    builder.start()
    yield
    builder.join()
    from nemo_skymoe.data.corpus import build_corpus

    # The corpus is there already, unless it cannot be built.
    story.corpus = build_corpus(story.folder("corpus"))


def _dense(story: Story, phases: Any, console: Console) -> None:
    from nemo_skymoe.recipes import skywork_tiny

    recipe = skywork_tiny.pretrain_recipe(
        dir=str(story.output), name="dense", corpus=str(story.folder("corpus")), devices=RANKS,
        max_steps=story.dense_steps, val_check_interval=story.dense_steps // 3,
    )  # fmt: skip
    _train(story, phases, console, "dense", "Dense pretraining (skywork_tiny, 2 ranks)", recipe)


def _upcycle(story: Story, phases: Any, console: Console) -> None:
    def upcycle() -> dict[str, float]:
        dense = last_checkpoint(story.folder("dense"))
        log = story.folder("logs") / "upcycle.log"
        return run_ranks(
            phases.upcycle_and_compare, RANKS, story.corpus, dense, story.folder("upcycled"), log
        )[0]

    story.before = _timed(story, console, "upcycling", "Upcycling to 16 experts", upcycle)
    _print_losses(console, "Loss on held-out text before the first step", story.before)


def _continue(story: Story, phases: Any, console: Console) -> None:
    from nemo_skymoe.moe.mesh import mesh_table
    from nemo_skymoe.recipes import skywork_moe_tiny, skywork_tiny

    shared = {
        "dir": str(story.output),
        "corpus": str(story.folder("corpus")),
        "devices": RANKS,
        "max_steps": story.steps,
        "val_check_interval": story.steps // 3,
        "max_lr": PEAK_LR,
        "min_lr": FINAL_LR,
        "data_seed": 2,
    }
    moe = skywork_moe_tiny.pretrain_recipe(name="moe", resume_path=str(story.folder("upcycled")), **shared)
    moe.model.config.moe_adaptive_aux_loss_smoothing = SMOOTHING
    results = _train(story, phases, console, "moe", "MoE pretraining (skywork_moe_tiny, EDP on 2 ranks)", moe)
    story.mesh = results[0]["mesh"]
    console.print("Device mesh: the expert-parallel (ep) group is the tensor-parallel (tp) group")
    console.print(mesh_table(story.mesh), highlight=False)
    dense_checkpoint = last_checkpoint(story.folder("dense"))
    dense = skywork_tiny.pretrain_recipe(name="dense_continued", resume_path=str(dense_checkpoint), **shared)
    _train(story, phases, console, "dense_continued", "Dense continued, same batches, same schedule", dense)

    def compare() -> dict[str, float]:
        checkpoints = [last_checkpoint(story.folder(name)) for name in ("dense_continued", "moe")]
        log = story.folder("logs") / "compare.log"
        return run_ranks(phases.compare, RANKS, story.corpus, *checkpoints, log)[0]

    story.after = _timed(story, console, "comparison", "Comparison", compare)
    _print_losses(console, "Loss on held-out text at the end", story.after)


def _train(
    story: Story, phases: Any, console: Console, name: str, title: str, recipe: Any
) -> list[dict[str, Any]]:
    recipe.log.ckpt.save_top_k = 0  # the last one is enough, and the same again
    terminal = os.dup(1)
    log = story.folder("logs") / f"{name}.log"
    later = _later(story, name)
    try:
        results = _timed(
            story,
            console,
            name,
            title,
            lambda: run_ranks(phases.train, RANKS, recipe, name, terminal, log, later, timeout=3600),
        )
    finally:
        os.close(terminal)
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    story.memory = max(story.memory, own + sum(result["memory"] for result in results))
    return results


def _later(story: Story, name: str) -> float:
    """Return the length of everything after a training, in steps of it."""
    steps = {"dense": story.dense_steps, "moe": story.steps, "dense_continued": story.steps}
    phases = list(_COSTS)
    after = phases[phases.index(name) + 1 :]
    return sum(steps.get(phase, 1) * _COSTS[phase] for phase in after) / _COSTS[name]


def _timed(story: Story, console: Console, name: str, title: str, work: Callable[[], Any]) -> Any:
    console.print(f"[bold]{title}[/]")
    begin = time.monotonic()
    result = work()
    story.seconds[name] = time.monotonic() - begin
    console.print(f"  [dim]{minutes(story.seconds[name])}[/]")
    return result


def _print_losses(console: Console, title: str, losses: dict[str, float]) -> None:
    console.print(title)  # a title of the table would be broken at the table's width
    table = Table()
    table.add_column("model")
    table.add_column("loss", justify="right")
    for name, loss in losses.items():
        table.add_row(name, f"{loss:.6f}")
    console.print(table)


def _verdict(story: Story) -> str:
    difference = story.after["MoE, nothing dropped"] - story.after["dense"]
    return (
        f"After {story.steps} steps the MoE's loss is {abs(difference):.3f} nats"
        f" {'below' if difference < 0 else 'above'} that of the dense model continued on the same batches."
    )
