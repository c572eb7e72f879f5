"""The `skymoe` command."""

import typer

app = typer.Typer(no_args_is_help=True, help="Skywork-MoE for NeMo and Megatron-Core.")


@app.callback()
def root() -> None:
    """Keep `skymoe` a group of commands."""


def main() -> None:
    """Entry point of the `skymoe` script."""
    app()
