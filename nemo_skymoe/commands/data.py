"""`skymoe`: commands on training data."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer


def preprocess(
    inputs: Annotated[
        list[str],
        typer.Argument(help="File, folder or pattern, or DOMAIN=PATH: en=web.jsonl.zst code=repos/."),
    ],
    output: Annotated[Path, typer.Argument(help="Folder to write; must not exist.")],
    tokenizer: Annotated[Path, typer.Option(help="tokenizer.json, tokenizer.model, or their folder.")],
    text_key: Annotated[str, typer.Option(help="Key, or column, of a document's text.")] = "text",
    format: Annotated[
        list[str] | None,
        typer.Option(
            help="jsonl, parquet, text (a document a file) or lines, of all files or as DOMAIN=FORMAT."
        ),
    ] = None,
    end_of_document: Annotated[
        str | None, typer.Option(help="Token after every document; by default the tokenizer's own.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes; the bytes are the same.")] = 1,
) -> None:
    """Tokenise text into Megatron's datasets.

    One dataset a domain, from JSONL (SkyPile's {"text": ...}), parquet or plain text, compressed (.gz, .zst, .bz2) or
    not. The same command goes on where an interrupted or refused one ended, with the inputs corrected. What is empty or
    undecodable is left out, counted, and listed in OUTPUT/rejected.txt.
    """
    from nemo_skymoe.commands import checkpoint_output
    from nemo_skymoe.data import preprocess

    start = time.monotonic()
    with checkpoint_output.progress("preprocess") as progress:
        domains = preprocess.preprocess(
            inputs,
            output,
            tokenizer,
            text_key=text_key,
            formats=format or [],
            end_of_document=end_of_document,
            workers=workers,
            progress=progress,
            say=lambda line: typer.echo(f"skymoe: {line}", err=True),
        )
    for name, domain in domains.items():
        left_out = f", left out {domain.empty} empty and {domain.undecodable} undecodable"
        typer.echo(
            f"{name}: {domain.tokens} tokens in {domain.documents} documents"
            + (left_out if domain.empty + domain.undecodable else "")
        )
    total = sum(domain.tokens for domain in domains.values())
    typer.echo(f"{output}: {total} tokens in {time.monotonic() - start:.1f} s")


COMMANDS: tuple[Callable[..., None], ...] = (preprocess,)
