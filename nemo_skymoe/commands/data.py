"""The commands of `skymoe` on training data."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from nemo_skymoe.commands.front_ends import Command


@dataclass(frozen=True, kw_only=True)
class PreprocessOptions:
    """Tokenise text into Megatron's datasets.

    The command writes one dataset for each domain, from JSONL (SkyPile's {"text": ...}), parquet or plain text, also
    compressed (.gz, .zst, .bz2). If it is interrupted or refuses an input, give it again, with the inputs corrected: it
    continues where it was. Empty and undecodable documents are left out, counted, and listed in OUTPUT/rejected.txt.
    """

    inputs: Annotated[
        list[str],
        typer.Argument(help="File, folder or pattern, or DOMAIN=PATH: en=web.jsonl.zst code=repos/."),
    ]
    output: Annotated[Path, typer.Argument(help="Folder to write, which must not exist.")]
    tokenizer: Annotated[Path, typer.Option(help="tokenizer.json, tokenizer.model, or their folder.")]
    text_key: Annotated[str, typer.Option(help="Key, or column, of a document's text.")] = "text"
    format: Annotated[
        list[str] | None,
        typer.Option(
            help="jsonl, parquet, text (one document per file) or lines (one per line), for all files or as DOMAIN=FORMAT."
        ),
    ] = None
    end_of_document: Annotated[
        str | None, typer.Option(help="Token after every document; default: the tokenizer's own.")
    ] = None
    workers: Annotated[
        int, typer.Option(min=1, help="Number of processes; it does not change the result.")
    ] = 1


def preprocess(options: PreprocessOptions) -> None:
    """Write the datasets, and print what they hold."""
    from nemo_skymoe.commands import checkpoint_output
    from nemo_skymoe.data import preprocess

    start = time.monotonic()
    with checkpoint_output.progress("preprocess") as progress:
        domains = preprocess.preprocess(
            options.inputs,
            options.output,
            options.tokenizer,
            text_key=options.text_key,
            formats=options.format or [],
            end_of_document=options.end_of_document,
            workers=options.workers,
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
    typer.echo(f"{options.output}: {total} tokens in {time.monotonic() - start:.1f} s")


@dataclass(frozen=True, kw_only=True)
class CorpusOptions:
    """Make the demonstration corpus.

    Its text is the source code of Python's standard library.
    """

    directory: Annotated[Path, typer.Argument(help="Folder to write.")]
    vocab_size: Annotated[int, typer.Option(help="Tokens of the tokenizer to train.")] = 2048


def corpus(options: CorpusOptions) -> None:
    """Write the corpus and its tokenizer, and print its size."""
    from nemo_skymoe.data.corpus import build_corpus

    made = build_corpus(options.directory, options.vocab_size, progress=typer.echo)
    typer.echo(f"{made.directory}: {made.train_tokens} tokens to train on, {made.valid_tokens} held out")


COMMANDS = (Command("corpus", CorpusOptions, corpus), Command("preprocess", PreprocessOptions, preprocess))
