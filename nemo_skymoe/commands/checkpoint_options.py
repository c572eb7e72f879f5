"""Options that several commands on checkpoints share, and their values read from text."""

from pathlib import Path
from typing import Annotated

import typer

from nemo_skymoe.config import ConfigurationError

Config = Annotated[
    Path | None, typer.Option(help="config.json for a Megatron checkpoint that does not describe itself.")
]
To = Annotated[str, typer.Option(help="Format to write: hf or nemo.")]
ShardSize = Annotated[str, typer.Option(help="Of the safetensors files, as in 5GB.")]
VocabSize = Annotated[
    int | None,
    typer.Option(
        help="Rows of embedding and head in a NeMo checkpoint; by default the next multiple of 128."
    ),
]
LayerSpec = Annotated[
    str | None,
    typer.Option(
        help="Layers that load a NeMo checkpoint: te or local; by default te where it is installed."
    ),
]
Workers = Annotated[int, typer.Option(min=1, help="Processes; the bytes are the same.")]
AllowNonfinite = Annotated[bool, typer.Option("--allow-nonfinite", help="Keep NaN and Inf, and count them.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would be written, from headers alone.")]
Repair = Annotated[
    bool, typer.Option("--repair", help="Write missing, damaged and edited files of the output again.")
]
NumExperts = Annotated[int, typer.Option(help="Experts of a layer; with granularity, copies of each MLP.")]
RouterTopk = Annotated[int, typer.Option("--moe-router-topk", help="Experts that a token meets.")]
Init = Annotated[str, typer.Option(help="copy, noise, drop, granular or specialized.")]
Seed = Annotated[int, typer.Option(help="Of all random numbers.")]
RouterStd = Annotated[float, typer.Option(help="Standard deviation of the routers.")]
Noise = Annotated[float | None, typer.Option(help="noise: relative to each matrix's own deviation.")]
DropRatio = Annotated[float | None, typer.Option(help="drop: share of each MLP that starts anew.")]
Granularity = Annotated[int | None, typer.Option(help="granular: experts that each MLP is cut into.")]
ExpertSource = Annotated[
    str | None, typer.Option(help="specialized: experts of each source, as in zh:3,en:3,code:1,base:1.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_bytes(text: str) -> int:
    """Read `5GB`, `512MiB` or `1000000`.

    Raises:
        ConfigurationError: Not a size.
    """
    digits = text.rstrip("BKMGIbkmgi ")
    unit = text[len(digits) :].strip().upper()
    try:
        return round(float(digits) * _UNITS[unit])
    except (ValueError, KeyError, OverflowError):
        raise ConfigurationError(f"shard_size is '{text}', expected a size as in 5GB or 512MiB") from None


def parse_sources(texts: list[str]) -> dict[str, Path]:
    """Read `PATH` or `NAME=PATH` each; a path without a name is the base.

    Raises:
        ConfigurationError: A name twice.
    """
    sources: dict[str, Path] = {}
    for text in texts:
        name, equals, path = text.partition("=")
        if not equals or "/" in name or Path(text).exists():
            name, path = "base", text
        if name in sources:
            raise ConfigurationError(
                f"there are two sources '{name}', '{sources[name]}' and '{path}': give each as NAME=PATH"
            )
        sources[name] = Path(path)
    return sources
