"""`make demo` trains a dense Skywork model on real text, upcycles it, and continues it as a Skywork-MoE."""

import multiprocessing
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

from nemo_skymoe import gpus
from nemo_skymoe.checkpoint.run_folder import checkpoint_of
from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.demo.door import RANKS, Door, Training, door_of
from nemo_skymoe.demo.record import DOORS, SMOOTHING, Story, minutes
from nemo_skymoe.doctor import require_supported
from nemo_skymoe.output import output_to
from nemo_skymoe.ranks import run_ranks

STEPS, QUICK_STEPS = (120, 150), (20, 20)
"""Steps of the dense model, and of each of the two that follow it."""
PEAK_LR, FINAL_LR = 1.5e-3, 1.5e-4
"""Learning rates of the MoE and of the continued dense model alike. This is the one peak that there is time for, chosen
before comparing."""
_COSTS = {"dense": 1.0, "upcycling": 40.0, "moe": 2.0, "dense_continued": 1.0, "comparison": 30.0}
"""Time that the phases take in this order, per step or as a whole, in steps of the dense model. The time left follows
from them."""


def run(output: Path, *, quick: bool = False, frontdoor: str = "nemo", device: str = "cpu") -> Path:
    """Tell the whole story in `output`, and write its report. The runs of an earlier demo there are removed.

    Args:
        output: Folder for the corpus (kept from an earlier run), the runs and the report.
        quick: Whether every training takes 20 steps, which shows that it works and teaches the models nothing.
        frontdoor: The front door that trains, one of `DOORS`.
        device: "cpu", which hides all GPUs from this process and its ranks, or "gpu", with a GPU for each rank.

    Returns:
        The report's path.

    Raises:
        ConfigurationError: `output` holds other files, the front door is unknown or not installed, or there are not as
            many GPUs as ranks.
    """
    if frontdoor not in DOORS:
        raise ConfigurationError(f"frontdoor is '{frontdoor}', expected {' or '.join(DOORS)}")
    require_supported(**{frontdoor: True})
    console = Console()
    story = Story(output.resolve(), *(QUICK_STEPS if quick else STEPS), frontdoor=frontdoor)
    chosen = _choose(device)
    story.device = device
    _clear(story.output, console)
    console.print("[bold]Skywork-MoE on a laptop[/]: a dense model, upcycled and continued as an MoE")
    console.print(chosen, highlight=False)
    begin = time.monotonic()
    with _corpus(story, console):
        console.print(f"  {story.door} is imported meanwhile, about 20 s; the third step shows the time left")
        with output_to(story.folder("logs") / "import.log"):
            door = door_of(frontdoor)
            from nemo_skymoe.demo.summary import write
    story.seconds[f"corpus, import of {story.door}"] = time.monotonic() - begin
    _dense(story, door, console)
    _upcycle(story, door, console)
    _continue(story, door, console)
    report = write(story, door)
    console.print(
        f"\n{_verdict(story)}\nReport: [bold]{report}[/]  ({minutes(sum(story.seconds.values()))} in all)"
    )
    return report


def _choose(device: str) -> str:
    """Hide the GPUs or count them, before anything asks torch for them, and say which device trains."""
    if device not in ("cpu", "gpu"):
        raise ConfigurationError(f"--device is '{device}', expected cpu or gpu")
    if device == "cpu":
        hidden = gpus.hide()
        seen = f": of {len(hidden)} GPUs none is used, --device gpu takes {RANKS}" if hidden else ""
        return f"It runs on the CPU{seen}"
    found = gpus.visible()
    if len(found) < RANKS:
        raise ConfigurationError(f"--device is 'gpu', expected {RANKS} GPUs: {len(found)} can be used here")
    return f"It runs on {RANKS} GPUs ({found[0]}); each phase starts its ranks anew, which takes the time of an import"


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


def _dense(story: Story, door: Door, console: Console) -> None:
    training = _training(story, "dense", story.dense_steps)
    _train(story, door, console, "Dense pretraining (skywork_tiny, 2 ranks)", training, door.dense)


def _upcycle(story: Story, door: Door, console: Console) -> None:
    from nemo_skymoe.demo import phases

    def upcycle() -> dict[str, float]:
        dense = checkpoint_of(story.folder("dense"))
        log = story.folder("logs") / "upcycle.log"
        arguments = story.frontdoor, story.corpus, dense, story.folder("upcycled")
        return run_ranks(phases.upcycle_and_compare, RANKS, *arguments, log=log)[0]

    story.before = _timed(story, console, "upcycling", "Upcycling to 16 experts", upcycle)
    _print_losses(console, "Loss on held-out text before the first step", story.before)


def _continue(story: Story, door: Door, console: Console) -> None:
    from nemo_skymoe.demo import phases
    from nemo_skymoe.moe.mesh import mesh_table

    shared: dict[str, Any] = {"learning_rates": (PEAK_LR, FINAL_LR), "data_seed": 2}
    upcycled, dense_checkpoint = story.folder("upcycled"), checkpoint_of(story.folder("dense"))
    moe = _training(story, "moe", story.steps, start=upcycled, smoothing=SMOOTHING, **shared)
    dense = _training(story, "dense_continued", story.steps, start=dense_checkpoint, **shared)
    results = _train(
        story, door, console, "MoE pretraining (skywork_moe_tiny, EDP on 2 ranks)", moe, door.moe
    )
    story.mesh = results[0]["mesh"]
    console.print("Device mesh: the expert-parallel (ep) group is the tensor-parallel (tp) group")
    console.print(mesh_table(story.mesh), highlight=False)
    _train(story, door, console, "Dense continued, same batches, same schedule", dense, door.dense)

    def compare() -> dict[str, float]:
        checkpoints = [checkpoint_of(story.folder(name)) for name in ("dense_continued", "moe")]
        log = story.folder("logs") / "compare.log"
        return run_ranks(phases.compare, RANKS, story.frontdoor, story.corpus, *checkpoints, log=log)[0]

    story.after = _timed(story, console, "comparison", "Comparison", compare)
    _print_losses(console, "Loss on held-out text at the end", story.after)


def _training(story: Story, name: str, steps: int, **more: Any) -> Training:
    return Training(folder=story.output, name=name, corpus=story.folder("corpus"), max_steps=steps, **more)


def _train(
    story: Story,
    door: Door,
    console: Console,
    title: str,
    training: Training,
    recipe_of: Callable[[Training], Any],
) -> list[dict[str, Any]]:
    from nemo_skymoe.demo import phases

    name = training.name
    log = story.folder("logs") / f"{name}.log"
    with output_to(log):
        recipe = recipe_of(training)
    arguments = story.frontdoor, recipe, name, _later(story, name)
    results = _timed(
        story,
        console,
        name,
        title,
        lambda: run_ranks(phases.train, RANKS, *arguments, timeout=3600, log=log),
    )
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
