"""`nemo skymoe inspect | convert | upcycle | verify | plan`: the commands of `skymoe` in NeMo-Run's form, KEY=VALUE.

They run here and now: they work on files and need no executor.
"""
# No `from __future__ import annotations`: NeMo-Run reads these signatures.

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

import nemo_run as run
import typer

from nemo_skymoe.commands import checkpoint
from nemo_skymoe.commands.front_ends import as_plain
from nemo_skymoe.commands.pipeline import PLAN
from nemo_skymoe.nemo.options import check_overrides, refuse_secrets


def _command(function: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except typer.Exit as end:  # NeMo-Run takes it for an error, whatever its code
            sys.exit(end.exit_code)

    summary = (function.__doc__ or "").partition("\n")[0]
    command: Any = run.cli.entrypoint(call, namespace="skymoe", enable_executor=False, help=summary)
    execute = command.cli_entrypoint._execute_simple

    def execute_known(args: list[str], console: Any) -> Any:
        refuse_secrets(args)
        check_overrides(run.Partial(command), args)
        return execute(args, console)

    command.cli_entrypoint._execute_simple = execute_known
    return command


@_command
def inspect(source: str, config: Optional[str] = None, as_json: bool = False) -> None:
    """Show what a checkpoint holds."""
    checkpoint.inspect(Path(source), _path(config), as_json)


@_command
def convert(
    source: str,
    output_path: str,
    to: str = "nemo",
    config: Optional[str] = None,
    shard_size: str = "5GB",
    vocab_size: Optional[int] = None,
    layer_spec: Optional[str] = None,
    workers: int = 1,
    allow_nonfinite: bool = False,
    dry_run: bool = False,
    as_json: bool = False,
) -> None:
    """Convert a checkpoint, bit for bit."""
    checkpoint.convert(
        Path(source),
        Path(output_path),
        to,
        _path(config),
        shard_size,
        vocab_size,
        layer_spec,
        workers,
        allow_nonfinite,
        dry_run,
        as_json,
    )


@_command
def upcycle(
    source: str,
    output_path: str,
    to: str = "nemo",
    num_experts: int = 16,
    moe_router_topk: int = 2,
    init: str = "copy",
    seed: int = 0,
    router_std: float = 0.02,
    noise: Optional[float] = None,
    drop_ratio: Optional[float] = None,
    granularity: Optional[int] = None,
    expert_source: Optional[dict[str, int]] = None,
    further_sources: Optional[dict[str, str]] = None,
    config: Optional[str] = None,
    shard_size: str = "5GB",
    vocab_size: Optional[int] = None,
    layer_spec: Optional[str] = None,
    workers: int = 1,
    allow_nonfinite: bool = False,
    dry_run: bool = False,
    as_json: bool = False,
) -> None:
    """Make an MoE of a dense checkpoint.

    Specialised experts: `init=specialized expert_source="{'zh':12,'base':4}" further_sources="{'zh':'FOLDER'}"`.
    """
    checkpoint.upcycle(
        _sources(source, further_sources),
        Path(output_path),
        to,
        num_experts,
        moe_router_topk,
        init,
        seed,
        router_std,
        noise,
        drop_ratio,
        granularity,
        ",".join(f"{name}:{count}" for name, count in expert_source.items()) if expert_source else None,
        _path(config),
        shard_size,
        vocab_size,
        layer_spec,
        workers,
        allow_nonfinite,
        dry_run,
        as_json,
    )


@_command
def verify(
    source: str,
    target: str,
    further_sources: Optional[dict[str, str]] = None,
    logits: Optional[str] = None,
    config: Optional[str] = None,
    as_json: bool = False,
) -> None:
    """Check a written checkpoint against its sources."""
    checkpoint.verify(_sources(source, further_sources), Path(target), _path(logits), _path(config), as_json)


plan = _command(
    as_plain(
        PLAN,
        module=__name__,
        renamed={"output": "output_path"},
        fixed={"json": False, "svg": None},
        required=["output"],
    )
)


def _path(text: Optional[str]) -> Optional[Path]:
    return None if text is None else Path(text)


def _sources(base: str, further: Optional[dict[str, str]]) -> list[str]:
    return [f"base={base}", *(f"{name}={folder}" for name, folder in (further or {}).items())]
