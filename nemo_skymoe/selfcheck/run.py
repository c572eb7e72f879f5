"""Run the checks, each on ranks of its own, so that one that crashes or hangs leaves the others alone."""

import tempfile
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from nemo_skymoe import gpus
from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.doctor import installed
from nemo_skymoe.ranks import RankFailed, run_ranks
from nemo_skymoe.selfcheck.finding import Finding

SECONDS = 120.0
"""A check that takes longer hangs."""
SIZES = (1, 2, 4, 8, 16)


def run(*, gpu: bool, ranks: int | None, output: Path, say: Callable[[str], None] = print) -> bool:
    """Make every check, say what each finds as soon as it is found, and write it all to a file.

    Args:
        gpu: Whether the checks run on this machine's GPUs; else they hide them and run on the CPU over gloo.
        ranks: Ranks that share a layer: 1, 2, 4, 8 or 16. None takes as many as there are GPUs, or 2 on a CPU.
        output: The file, which is replaced.

    Returns:
        Whether nothing was found wrong.

    Raises:
        ConfigurationError: There are fewer GPUs than ranks, or the number of ranks is another.
    """
    found = gpus.visible() if gpu else []
    if not gpu:
        gpus.hide()
    count = _ranks(gpu, ranks, len(found))
    head = [f"{name} {version}" for name, version in installed().items() if version]
    lines = [", ".join(head), f"{count} ranks on {found[0] if found else 'the CPU, over gloo'}", ""]
    for line in lines:
        say(line)
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        for name, finding in _findings(count, Path(folder)):
            wrong += finding.verdict == "WRONG"
            lines.append(f"{name:9} {finding}")
            say(lines[-1])
    lines.append(f"\n{wrong} of {len(lines) - 3} lines are WRONG" if wrong else "\nNothing is wrong.")
    say(lines[-1])
    output.write_text("\n".join(lines) + "\n")
    say(f"Attach {output} to an issue.")
    return wrong == 0


def _ranks(gpu: bool, ranks: int | None, found: int) -> int:
    if gpu and not found:
        raise ConfigurationError(
            "--gpu needs a GPU that this process may use, and none was found: --ranks runs on the CPU"
        )
    count = ranks or (max(size for size in SIZES if size <= found) if gpu else 2)
    if count not in SIZES:
        raise ConfigurationError(f"--ranks is {count}, expected {', '.join(map(str, SIZES))}")
    if gpu and count > found:
        raise ConfigurationError(f"--ranks is {count}, expected at most {found}, the number of GPUs")
    return count


def _findings(ranks: int, folder: Path) -> Iterator[tuple[str, Finding]]:
    for name, check in _checks(ranks, folder).items():
        try:
            for finding in check():
                yield name, finding
        except RankFailed as reason:
            said = [line for line in str(reason).splitlines() if line.strip()]
            yield name, Finding("WRONG", "the check did not come to its end", f"{said[0]} {said[-1].strip()}")


def _checks(ranks: int, folder: Path) -> dict[str, Callable[[], list[Finding]]]:
    def on(count: int, function: str, *args: Any, **more: Any) -> Any:
        log = folder / f"{function}.log"
        return run_ranks(_call, count, function, *args, timeout=SECONDS, log=log, **more)[0]

    def toy() -> list[Finding]:
        hidden = {gpus.VISIBLE: ""}
        return on(1, "toy:compare", on(1, "toy:values", env=hidden), on(1, "toy:values"))

    return {
        "parts": lambda: on(1, "parts:check"),
        "tables": lambda: on(1, "tables:check"),
        "toy": toy,
        "router": lambda: on(1, "router:check"),
        "dispatch": lambda: on(ranks, "dispatch:check"),
        "saving": lambda: on(ranks, "saving:check", _new(folder / "checkpoint")),
    }


def _new(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _call(function: str, *args: Any) -> Any:
    """Import a check where it runs: this process must not ask for a GPU."""
    module, _, name = function.partition(":")
    return getattr(import_module(f"nemo_skymoe.selfcheck.{module}"), name)(*args)
