"""`skymoe`: commands on checkpoints."""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nemo_skymoe.commands.checkpoint_options import (
    AllowNonfinite,
    Config,
    DropRatio,
    DryRun,
    ExpertSource,
    Granularity,
    Init,
    Json,
    LayerSpec,
    Noise,
    NumExperts,
    Repair,
    RouterStd,
    RouterTopk,
    Seed,
    ShardSize,
    To,
    VocabSize,
    Workers,
    parse_bytes,
    parse_sources,
)
from nemo_skymoe.config import ConfigurationError

if TYPE_CHECKING:
    from nemo_skymoe.checkpoint.convert import Plan, TargetOptions
    from nemo_skymoe.checkpoint.upcycling import Upcycling


def inspect(
    source: Annotated[Path, typer.Argument(help="Folder of a checkpoint.")],
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Show what a checkpoint holds.

    From its headers alone: format, sizes, data types, vocabulary, gate, tokenizer, receipt. The exit code is 1 where
    something is wrong with it.
    """
    from dataclasses import asdict

    from nemo_skymoe.checkpoint import inspection
    from nemo_skymoe.commands import checkpoint_output

    found = inspection.inspect(source, config)
    if as_json:
        typer.echo(json.dumps(asdict(found)))
    else:
        checkpoint_output.show_inspection(found)
    raise typer.Exit(1 if found.problems else 0)


def convert(
    source: Annotated[Path, typer.Argument(help="Folder of a checkpoint, in any format.")],
    output: Annotated[Path, typer.Argument(help="New folder to write, or this command's own.")],
    to: To,
    config: Config = None,
    shard_size: ShardSize = "5GB",
    vocab_size: VocabSize = None,
    layer_spec: LayerSpec = None,
    workers: Workers = 1,
    allow_nonfinite: AllowNonfinite = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    repair: Repair = False,
) -> None:
    """Convert a checkpoint, bit for bit.

    Between Hugging Face's form and NeMo's, in bounded memory. The same command goes on where an interrupted one ended;
    with --repair it writes those files of a finished output again that are missing, damaged or edited.
    """
    from nemo_skymoe.checkpoint.convert import TargetOptions

    options = TargetOptions(to, parse_bytes(shard_size), vocab_size, layer_spec)
    plan = _plan({"base": source}, options, None, config)
    _run(plan, output, workers, allow_nonfinite, repair, dry_run, as_json)


def upcycle(
    sources: Annotated[list[str], typer.Argument(help="Dense checkpoint, or several as NAME=PATH.")],
    output: Annotated[Path, typer.Argument(help="New folder to write, or this command's own.")],
    to: To,
    num_experts: NumExperts = 16,
    moe_router_topk: RouterTopk = 2,
    init: Init = "copy",
    seed: Seed = 0,
    router_std: RouterStd = 0.02,
    noise: Noise = None,
    drop_ratio: DropRatio = None,
    granularity: Granularity = None,
    expert_source: ExpertSource = None,
    config: Config = None,
    shard_size: ShardSize = "5GB",
    vocab_size: VocabSize = None,
    layer_spec: LayerSpec = None,
    workers: Workers = 1,
    allow_nonfinite: AllowNonfinite = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    repair: Repair = False,
) -> None:
    """Make an MoE of a dense checkpoint.

    In bounded memory; the same command goes on where an interrupted one ended, and repairs as `convert` does. A specialised MoE takes its experts
    from several checkpoints, and all else from the one called base: `skymoe upcycle base=A zh=B OUTPUT --init
    specialized --expert-source zh:12,base:4`.
    """
    from nemo_skymoe.checkpoint.convert import TargetOptions
    from nemo_skymoe.checkpoint.upcycling import Upcycling, parse_expert_source

    options = TargetOptions(to, parse_bytes(shard_size), vocab_size, layer_spec)
    upcycling = Upcycling(
        num_experts,
        moe_router_topk,
        init,
        seed,
        router_std,
        noise,
        drop_ratio,
        granularity,
        None if expert_source is None else parse_expert_source(expert_source),
    )
    plan = _plan(parse_sources(sources), options, upcycling, config)
    _run(plan, output, workers, allow_nonfinite, repair, dry_run, as_json)


def verify(
    sources: Annotated[
        list[str], typer.Argument(help="The checkpoint, or NAME=PATH each, it was made from.")
    ],
    target: Annotated[Path, typer.Argument(help="The checkpoint that was written.")],
    logits: Annotated[
        Path | None,
        typer.Option(help="File of text on which both models' logits are compared, in float32."),
    ] = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Check a written checkpoint against its sources.

    Recomputes every tensor by code that shares nothing with the writer's. The exit code is 1 where a bit differs.
    """
    from nemo_skymoe.checkpoint.verification import verifier
    from nemo_skymoe.commands import checkpoint_output

    given = parse_sources(sources)
    if logits is not None and not logits.is_file():
        raise ConfigurationError(f"--logits is '{logits}', expected a file of text")
    with checkpoint_output.progress("verify", quiet=as_json) as progress:
        result = verifier.verify(given, target, config, progress)
    difference = None
    if logits is not None and not result.problems:
        from nemo_skymoe.checkpoint.verification.logits import compare_logits

        difference = compare_logits(given["base"], target, logits, config)
        result.problems += [difference.problem] if difference.problem else []
    checkpoint_output.show_verification(result, difference, as_json)
    raise typer.Exit(1 if result.problems else 0)


def _plan(
    folders: dict[str, Path], options: "TargetOptions", upcycling: "Upcycling | None", config: Path | None
) -> "Plan":
    from nemo_skymoe.checkpoint import convert

    sources = {name: convert.open_source(folder, config) for name, folder in folders.items()}
    return convert.plan(sources, options, upcycling)


def _run(
    plan: "Plan",
    output: Path,
    workers: int,
    allow_nonfinite: bool,
    repair: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    from nemo_skymoe.commands import checkpoint_output

    if dry_run:
        plan.check_output(output)
        raise typer.Exit(0 if checkpoint_output.show_plan(plan, output, as_json) else 1)
    done = output.is_dir()
    unfinished = output.absolute().parent / f"{output.name}.unfinished"
    if unfinished.is_dir():
        typer.echo(f"{plan.job['command']}: going on with {unfinished}", err=True)
    repaired: dict[str, str] = {}

    def on_damage(damages: Mapping[str, str]) -> None:
        repaired.update(damages)
        for name, reason in damages.items():
            typer.echo(f"{plan.job['command']}: '{output / name}' {reason}: it is written again", err=True)

    with checkpoint_output.progress(plan.job["command"], quiet=as_json) as progress:
        start = time.monotonic()
        receipt = plan.run(output, workers, progress, allow_nonfinite, repair, on_damage)
    seconds = None if done else time.monotonic() - start
    checkpoint_output.show_receipt(receipt, output, seconds, list(repaired), as_json)


COMMANDS: tuple[Callable[..., None], ...] = (inspect, convert, upcycle, verify)
