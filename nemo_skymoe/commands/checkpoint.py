"""The commands of `skymoe` on checkpoints."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from nemo_skymoe.commands.checkpoint_options import (
    ConvertOptions,
    InspectOptions,
    UpcycleOptions,
    VerifyOptions,
    WritingOptions,
    parse_bytes,
    parse_sources,
)
from nemo_skymoe.commands.front_ends import Command
from nemo_skymoe.config import ConfigurationError

if TYPE_CHECKING:
    from nemo_skymoe.checkpoint.convert import Plan
    from nemo_skymoe.checkpoint.upcycling.options import Upcycling


def inspect(options: InspectOptions) -> None:
    """Print what a checkpoint holds. The exit code is 1 if something is wrong with it."""
    from dataclasses import asdict

    from nemo_skymoe.checkpoint import inspection
    from nemo_skymoe.commands import checkpoint_output

    found = inspection.inspect(options.source, options.config)
    if options.as_json:
        typer.echo(json.dumps(asdict(found)))
    else:
        checkpoint_output.show_inspection(found)
    raise typer.Exit(1 if found.problems else 0)


def convert(options: ConvertOptions) -> None:
    """Write the checkpoint in another form, or show what would be written."""
    _run(_plan({"base": options.source}, options, None), options.output, options)


def upcycle(options: UpcycleOptions) -> None:
    """Write the MoE, or show what would be written."""
    from nemo_skymoe.checkpoint.upcycling.options import Upcycling, parse_expert_source

    sources = None if options.expert_source is None else parse_expert_source(options.expert_source)
    upcycling = Upcycling(
        num_experts=options.num_experts,
        moe_router_topk=options.moe_router_topk,
        init=options.init,
        seed=options.seed,
        router_std=options.router_std,
        noise=options.noise,
        drop_ratio=options.drop_ratio,
        granularity=options.granularity,
        expert_source=sources,
    )
    _run(_plan(parse_sources(options.sources), options, upcycling), options.output, options)


def verify(options: VerifyOptions) -> None:
    """Recompute every tensor and compare. The exit code is 1 if a bit differs."""
    from nemo_skymoe.checkpoint.verification import verifier
    from nemo_skymoe.commands import checkpoint_output

    given, logits = parse_sources(options.sources), options.logits
    if logits is not None and not logits.is_file():
        raise ConfigurationError(f"--logits is '{logits}', expected a file of text")
    with checkpoint_output.progress("verify", quiet=options.as_json) as progress:
        result = verifier.verify(given, options.target, options.config, progress)
    difference = None
    if logits is not None and not result.problems:
        from nemo_skymoe.checkpoint.verification.same_function import compare_logits

        difference = compare_logits(given["base"], options.target, logits, options.config)
        result.problems += [difference.problem] if difference.problem else []
    checkpoint_output.show_verification(result, difference, options.as_json)
    raise typer.Exit(1 if result.problems else 0)


def _plan(folders: dict[str, Path], options: WritingOptions, upcycling: "Upcycling | None") -> "Plan":
    from nemo_skymoe.checkpoint import convert
    from nemo_skymoe.checkpoint.sources import open_source

    target = convert.TargetOptions(
        options.to, parse_bytes(options.shard_size), options.vocab_size, options.layer_spec, options.layout
    )
    sources = {name: open_source(folder, options.config) for name, folder in folders.items()}
    return convert.plan(sources, target, upcycling)


def _run(plan: "Plan", output: Path, options: WritingOptions) -> None:
    from nemo_skymoe.commands import checkpoint_output

    as_json = options.as_json
    if options.dry_run:
        plan.check_output(output)
        raise typer.Exit(0 if checkpoint_output.show_plan(plan, output, as_json) else 1)
    done = output.is_dir()
    unfinished = output.absolute().parent / f"{output.name}.unfinished"
    if unfinished.is_dir():
        typer.echo(f"{plan.job['command']}: continuing with {unfinished}", err=True)
    repaired: dict[str, str] = {}

    def on_damage(damages: Mapping[str, str]) -> None:
        repaired.update(damages)
        for name, reason in damages.items():
            typer.echo(f"{plan.job['command']}: '{output / name}' {reason}: it is written again", err=True)

    with checkpoint_output.progress(plan.job["command"], quiet=as_json) as progress:
        start = time.monotonic()
        receipt = plan.run(
            output,
            workers=options.workers,
            progress=progress,
            allow_nonfinite=options.allow_nonfinite,
            repair=options.repair,
            on_damage=on_damage,
        )
    seconds = None if done else time.monotonic() - start
    checkpoint_output.show_receipt(receipt, output, seconds, list(repaired), as_json)


INSPECT = Command("inspect", InspectOptions, inspect)
CONVERT = Command("convert", ConvertOptions, convert)
UPCYCLE = Command("upcycle", UpcycleOptions, upcycle)
VERIFY = Command("verify", VerifyOptions, verify)
COMMANDS = (INSPECT, CONVERT, UPCYCLE, VERIFY)
