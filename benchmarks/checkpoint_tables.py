"""The page of `benchmarks/checkpoint.py`, from the lines that its pieces left."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise
from statistics import median
from typing import Any

Result = dict[str, Any]
MEGABYTE = 1e6


def page(results: Sequence[Result]) -> str:
    """All tables: speed, memory, the random inits beside their generator, and how busy the machine was."""
    parts = [_head(results), _speed(results), _memory(results), _random(results)]
    return "\n\n".join(parts)


def spread(values: Iterable[float], digits: int = 0) -> str:
    """Median, and in brackets the smallest and the largest of several."""
    listed = sorted(values)
    middle = f"{median(listed):,.{digits}f}"
    return f"{middle} ({listed[0]:,.{digits}f}-{listed[-1]:,.{digits}f})" if len(listed) > 1 else middle


def rates(result: Result) -> list[float]:
    """MB/s of each run."""
    return [result["bytes"] / run["seconds"] / MEGABYTE for run in result["runs"]]


def ratios(result: Result) -> list[float]:
    """Each run's rate over the mean of the plain writes just before and just after it."""
    around = [(a + b) / 2 / MEGABYTE for a, b in pairwise(result["plain"])]
    return [rate / reference for rate, reference in zip(rates(result), around, strict=True)]


def _head(results: Sequence[Result]) -> str:
    settings = sorted({(each["workers"], each["cores"], each["date"]) for each in results})
    return (
        "; ".join(f"`--workers {workers}`, {cores} cores, {date}" for workers, cores, date in settings) + "."
    )


def _speed(results: Sequence[Result]) -> str:
    lines = [
        "| | GB written | runs | MB/s | plain write MB/s | ratio | processor s/GB | naive MB/s | cores busy before |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for result in results:
        naive = result["naive"]
        cells = [
            result["row"],
            f"{result['bytes'] / 1e9:.2f}",
            str(len(result["runs"])),
            spread(rates(result)),
            spread(rate / MEGABYTE for rate in result["plain"]),
            spread(ratios(result), 2),
            spread((run["processor"] / result["bytes"] * 1e9 for run in result["runs"]), 2),
            f"{naive['bytes'] / naive['seconds'] / MEGABYTE:,.0f}" if naive else "",
            f"{result['busy']:.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _memory(results: Sequence[Result]) -> str:
    """A line for each row, a column for each size: peak and bound."""
    sizes = list(dict.fromkeys(result["size"] for result in results))
    rows: dict[str, dict[str, Result]] = defaultdict(dict)
    for result in results:
        rows[result["row"]][result["size"]] = result
    lines = [
        f"| peak MB / bound MB | {' | '.join(f'{size} GB' for size in sizes)} |",
        "|---|" + "---:|" * len(sizes),
    ]
    for row, by_size in rows.items():
        cells = [_peak(by_size[size]) if size in by_size else "" for size in sizes]
        lines.append(f"| {row} | {' | '.join(cells)} |")
        naive = [_naive_peak(by_size.get(size)) for size in sizes]
        if any(naive):
            lines.append(f"| the same, naive | {' | '.join(naive)} |")
    return "\n".join(lines)


def _peak(result: Result) -> str:
    peak = max(run["peak"] for run in result["runs"])
    return f"{peak / MEGABYTE:,.0f} / {result['bound'] / MEGABYTE:,.0f}"


def _naive_peak(result: Result | None) -> str:
    return f"{result['naive']['peak'] / MEGABYTE:,.0f}" if result and result["naive"] else ""


def _random(results: Sequence[Result]) -> str:
    drawn = [result["generator"] for result in results if result["generator"]]
    if not drawn:
        return "The generator's rate was not measured."
    alone, blocks = (spread(rate / MEGABYTE for rate in column) for column in zip(*drawn, strict=True))
    return (
        f"NumPy's Philox alone draws {alone} MB/s of bfloat16 on one core; in blocks on all cores {blocks} MB/s,"
        " rounding included."
    )
