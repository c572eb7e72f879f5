"""`nemo skymoe inspect | convert | upcycle | verify | plan` are commands of `skymoe` in NeMo-Run's form, KEY=VALUE.

They run at once on this machine, because they work on files and need no executor.
"""
# No `from __future__ import annotations`: NeMo-Run reads these signatures.

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

import nemo_run as run
import typer

from nemo_skymoe.commands.checkpoint import CONVERT, INSPECT, UPCYCLE, VERIFY
from nemo_skymoe.commands.front_ends import REQUIRED, Given, as_plain
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


def _sources(source: str, further_sources: dict[str, str] | None = None) -> list[str]:
    return [f"base={source}", *(f"{name}={folder}" for name, folder in (further_sources or {}).items())]


def _experts(expert_source: dict[str, int] | None = None) -> str | None:
    return ",".join(f"{name}:{count}" for name, count in (expert_source or {}).items()) or None


_OUTPUT = {"output": Given({"output_path": (str, REQUIRED)}, lambda output_path: Path(output_path))}
_WRITING = _OUTPUT | {"to": Given({"to": (str, "nemo")}, lambda to: to)}
_SOURCES = {
    "sources": Given(
        {"source": (str, REQUIRED), "further_sources": (Optional[dict[str, str]], None)}, _sources
    )
}
_EXPERTS = {"expert_source": Given({"expert_source": (Optional[dict[str, int]], None)}, _experts)}

inspect = _command(as_plain(INSPECT, module=__name__))
convert = _command(as_plain(CONVERT, module=__name__, given=_WRITING))
upcycle = _command(as_plain(UPCYCLE, module=__name__, given=_WRITING | _SOURCES | _EXPERTS))
verify = _command(as_plain(VERIFY, module=__name__, given=_SOURCES))
plan = _command(as_plain(PLAN, module=__name__, given=_OUTPUT, fixed={"json": False, "svg": None}))
