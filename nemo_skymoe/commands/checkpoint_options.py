"""The options of the commands on checkpoints, and functions that read their values from text."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from nemo_skymoe.config import ConfigurationError

Config = Annotated[
    Path | None, typer.Option(help="config.json for a Megatron checkpoint that does not describe itself.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


@dataclass(frozen=True, kw_only=True)
class InspectOptions:
    """Show what a checkpoint holds.

    The command reads headers alone. It shows format, sizes, data types, vocabulary, gate, tokenizer and receipt. The
    exit code is 1 if something is wrong with the checkpoint.
    """

    source: Annotated[Path, typer.Argument(help="Folder of a checkpoint.")]
    config: Config = None
    as_json: Json = False


@dataclass(frozen=True, kw_only=True)
class WritingOptions:
    """Options of every command that writes a checkpoint."""

    to: Annotated[str, typer.Option(help="Format to write: hf, nemo or bridge.")]
    config: Config = None
    shard_size: Annotated[str, typer.Option(help="Largest size of a safetensors file, as in 5GB.")] = "5GB"
    vocab_size: Annotated[
        int | None,
        typer.Option(
            help="Rows of embedding and head for NeMo or Bridge; default: the next multiple of 128."
        ),
    ] = None
    layer_spec: Annotated[
        str | None,
        typer.Option(
            help="Layers whose names a checkpoint for NeMo or Bridge has: te, Transformer Engine's (default), or local."
        ),
    ] = None
    layout: Annotated[
        str | None,
        typer.Option(
            help="Class in whose form an MoE is written for hf: skywork, mixtral or qwen3_moe; default: the source's."
        ),
    ] = None
    workers: Annotated[
        int, typer.Option(min=1, help="Number of processes; it does not change the result.")
    ] = 1
    allow_nonfinite: Annotated[
        bool, typer.Option("--allow-nonfinite", help="Keep NaN and Inf, and count them.")
    ] = False
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be written, from headers alone.")
    ] = False
    repair: Annotated[
        bool, typer.Option("--repair", help="Write missing, damaged and edited files of the output again.")
    ] = False
    as_json: Json = False


@dataclass(frozen=True, kw_only=True)
class ConvertOptions(WritingOptions):
    """Convert a checkpoint between the forms of Hugging Face, NeMo and Megatron-Bridge, bit for bit.

    Memory stays bounded at any size. If the command is interrupted, give it again: it continues where it was. With
    --repair it writes the files of a finished output again that are missing, damaged or edited.
    """

    source: Annotated[Path, typer.Argument(help="Folder of a checkpoint, in any format.")]
    output: Annotated[Path, typer.Argument(help="New folder to write, or this command's own.")]


@dataclass(frozen=True, kw_only=True)
class UpcycleOptions(WritingOptions):
    """Make an MoE of a dense checkpoint.

    The command continues and repairs as `convert` does, and memory stays bounded too. A specialised MoE takes its
    experts from several checkpoints, and everything else from the one called base: `skymoe upcycle base=A zh=B OUTPUT
    --init specialized --expert-source zh:12,base:4`.
    """

    sources: Annotated[list[str], typer.Argument(help="Dense checkpoint, or several as NAME=PATH.")]
    output: Annotated[Path, typer.Argument(help="New folder to write, or this command's own.")]
    num_experts: Annotated[
        int, typer.Option(help="Number of experts of a layer; with granularity, of copies of each MLP.")
    ] = 16
    moe_router_topk: Annotated[
        int, typer.Option("--moe-router-topk", help="Number of experts that see a token.")
    ] = 2
    init: Annotated[str, typer.Option(help="copy, noise, drop, granular or specialized.")] = "copy"
    seed: Annotated[int, typer.Option(help="Seed of all random numbers.")] = 0
    router_std: Annotated[float, typer.Option(help="Standard deviation of the routers' weights.")] = 0.02
    noise: Annotated[
        float | None,
        typer.Option(help="With noise: standard deviation of the noise, relative to each matrix's own."),
    ] = None
    drop_ratio: Annotated[
        float | None, typer.Option(help="With drop: share of each MLP that is drawn anew.")
    ] = None
    granularity: Annotated[
        int | None, typer.Option(help="With granular: number of experts that each MLP is cut into.")
    ] = None
    expert_source: Annotated[
        str | None,
        typer.Option(
            help="With specialized: number of experts of each source, as in zh:3,en:3,code:1,base:1."
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """Check a written checkpoint against its sources.

    The command recomputes every tensor with code that shares nothing with the writer's. The exit code is 1 if a bit
    differs.
    """

    sources: Annotated[
        list[str], typer.Argument(help="The checkpoint that it was made from, or several as NAME=PATH.")
    ]
    target: Annotated[Path, typer.Argument(help="The checkpoint that was written.")]
    logits: Annotated[
        Path | None,
        typer.Option(help="File of text on which the logits of both models are compared, in float32."),
    ] = None
    config: Config = None
    as_json: Json = False


_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_bytes(text: str) -> int:
    """Read `5GB`, `512MiB` or `1000000`.

    Raises:
        ConfigurationError: The text is not a size.
    """
    digits = text.rstrip("BKMGIbkmgi ")
    unit = text[len(digits) :].strip().upper()
    try:
        return round(float(digits) * _UNITS[unit])
    except (ValueError, KeyError, OverflowError):
        raise ConfigurationError(f"shard_size is '{text}', expected a size as in 5GB or 512MiB") from None


def parse_sources(texts: list[str]) -> dict[str, Path]:
    """Read texts of the form `PATH` or `NAME=PATH`. A path without a name is the base.

    Raises:
        ConfigurationError: Two of them have the same name.
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
