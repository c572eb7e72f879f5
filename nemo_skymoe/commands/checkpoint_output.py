"""Print the plans, the progress and the results of commands on checkpoints."""

import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from nemo_skymoe.checkpoint.convert import Plan
    from nemo_skymoe.checkpoint.inspection import Inspection
    from nemo_skymoe.checkpoint.verification.comparison import Comparison
    from nemo_skymoe.checkpoint.verification.same_function import LogitDifference

Progress = Callable[[int, int, str], None]
_SECONDS_BETWEEN_LINES = 10.0
_PROBLEMS_SHOWN = 20


def size(count: float) -> str:
    """Format bytes for people, such as 292.7 GB."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def show_plan(plan: "Plan", output: Path, as_json: bool) -> bool:
    """Print the tensors that would be written and the room that they need, and say whether there is that much."""
    infos = plan.infos()
    needed, free = plan.target.bytes - _bytes_there(plan, output), free_bytes(output)
    if as_json:
        tensors = [{"name": name, **asdict(info), "bytes": info.bytes} for name, info in infos.items()]
        total = {"output": str(output), "bytes_needed": needed, "bytes_free": free, "job": dict(plan.job)}
        typer.echo(json.dumps({**total, "tensors": tensors}))
        return needed <= free
    width = max(map(len, infos))
    lines = [
        f"{name:{width}}  {info.dtype}  {list(info.shape)!s:24}  {size(info.bytes)}"
        for name, info in infos.items()
    ]
    verdict = "" if needed <= free else ": NOT ENOUGH"
    lines.append(f"{len(infos)} tensors; {size(needed)} needed, {size(free)} free{verdict}")
    typer.echo("\n".join(lines))
    return needed <= free


def _bytes_there(plan: "Plan", output: Path) -> int:
    """Return the number of bytes that an earlier attempt has written already."""
    folders = (output, output.absolute().parent / f"{output.name}.unfinished")
    files = (folder / file.name for folder in folders for file in plan.target.files())
    return sum(file.stat().st_size for file in files if file.is_file())


def free_bytes(output: Path) -> int:
    """Return the free bytes of the file system of `output`."""
    place = output.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


@contextmanager
def progress(title: str, quiet: bool = False) -> Iterator[Progress]:
    """Show progress on stderr: a bar with bytes, rate and remaining time on a terminal, and lines elsewhere."""
    if quiet:
        yield lambda done, total, what: None
    elif sys.stderr.isatty():
        with _bar(title) as update:
            yield update
    else:
        yield _Lines(title)


@contextmanager
def _bar(title: str) -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        "{task.description}",
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        "{task.fields[what]}",
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:
        task = bars.add_task(title, total=None, what="")
        yield lambda done, total, what: bars.update(task, completed=done, total=total, what=what)


class _Lines:
    """Prints one line every ten seconds, and one at the end."""

    def __init__(self, title: str):
        self.title, self.start, self.shown, self.done = title, time.monotonic(), 0.0, -1

    def __call__(self, done: int, total: int, what: str) -> None:
        now = time.monotonic()
        if done == self.done or (done < total and now - self.shown < _SECONDS_BETWEEN_LINES):
            return
        self.shown, self.done = now, done
        rate = done / max(now - self.start, 1e-9)
        typer.echo(f"{self.title}: {size(done)} of {size(total)}, {size(rate)}/s", err=True)


def show_inspection(found: "Inspection") -> None:
    """Print everything that is known of a checkpoint, one property per line."""
    values: dict[str, Any] = asdict(found)
    problems, following = values.pop("problems"), values.pop("next")
    for name, value in values.items():
        if name == "bytes" and value is not None:
            value = size(value)
        if value not in (None, [], {}):
            typer.echo(f"{name.replace('_', ' '):22}{_plain(value)}")
    for what, command in following.items():
        typer.echo(f"{what:22}{command}")
    for problem in problems:
        typer.echo(f"problem: {problem}", err=True)


def show_receipt(
    receipt: Mapping[str, Any], output: Path, seconds: float | None, repaired: Sequence[str], as_json: bool
) -> None:
    """Print what was written, and how fast. If `seconds` is None it was there already, except for `repaired` files."""
    files: Mapping[str, Any] = receipt["files"]
    total = sum(file["bytes"] for file in files.values())
    if as_json:
        done = {"output": str(output), "bytes": total, "files": len(files), "seconds": seconds}
        typer.echo(json.dumps({**done, "repaired": list(repaired), "job": receipt["job"]}))
        return
    if repaired:
        count = f"{len(repaired)} of {len(files)} files"
        typer.echo(f"{output} is whole again: {count} written anew, the rest unchanged")
        return
    if seconds is None:
        typer.echo(f"{output} is there already, unchanged: {len(files)} files, {size(total)}")
        return
    rate = size(total / max(seconds, 1e-9))
    typer.echo(f"{output}: {len(files)} files, {size(total)} in {seconds:.1f} s, {rate}/s")


def show_verification(result: "Comparison", logits: "LogitDifference | None", as_json: bool) -> None:
    """Print what was compared, and the first differences."""
    if as_json:
        typer.echo(json.dumps(asdict(result) | {"logits": None if logits is None else asdict(logits)}))
        return
    for problem in result.problems[:_PROBLEMS_SHOWN]:
        typer.echo(f"problem: {problem}", err=True)
    if len(result.problems) > _PROBLEMS_SHOWN:
        typer.echo(f"problem: and {len(result.problems) - _PROBLEMS_SHOWN} more", err=True)
    verdict = f"{len(result.problems)} problems" if result.problems else "every bit as expected"
    beside = f", and {result.files} files beside them" if result.files else ""
    typer.echo(f"{result.tensors} tensors, {size(result.bytes)} compared{beside}: {verdict}")
    if logits is not None:
        typer.echo(f"logits of {logits.tokens} tokens: max|difference| / max|logit| = {logits.relative:.1e}")


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_plain(item)}" for name, item in value.items() if item is not None)
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value))
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
