"""`skymoe evaluate`."""

import json as json_text
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from nemo_skymoe.commands.front_ends import Command


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """Benchmark an exported model.

    This needs lm-evaluation-harness (pip install -e '.[nemo,eval]'). table1 stands for the report's six benchmarks,
    with its figures beside yours: C-Eval, CMMLU, MMLU and GSM8K with 5 shots, MATH with 4, HumanEval with none. The
    shots are ours, since the report names none.

    Modeling files are run only if they are the package's own, byte for byte. Other code that a model names is
    refused, unless its class is named in the environment variable SKYMOE_ALLOWED_CLASSES.
    """

    model: Annotated[
        Path,
        typer.Argument(help="Folder of an exported model; the package's own modeling files in it are run."),
    ]
    tasks: Annotated[
        str, typer.Option(help="table1, or names of the harness' tasks and YAML files, separated by commas.")
    ] = "table1"
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Number of shots, for tasks given by their names.")
    ] = None
    limit: Annotated[
        int | None, typer.Option(min=1, help="Number of documents of each task, for a trial.")
    ] = None
    batch_size: Annotated[int, typer.Option(min=1, help="Number of requests at a time.")] = 1
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, ...; default: the checkpoint's.")] = "auto"
    allow_code: Annotated[
        bool,
        typer.Option(
            "--allow-code",
            help="Run the programs that the model writes (HumanEval), and functions and templates of YAML files.",
        ),
    ] = False
    json: Annotated[bool, typer.Option("--json", help="Print the scores as JSON.")] = False


def evaluate(options: EvaluateOptions) -> None:
    """Evaluate the model, and print its scores."""
    from dataclasses import asdict

    from nemo_skymoe import evaluation

    scores = evaluation.evaluate(
        options.model,
        [name.strip() for name in options.tasks.split(",")],
        num_fewshot=options.num_fewshot,
        limit=options.limit,
        batch_size=options.batch_size,
        dtype=options.dtype,
        allow_code=options.allow_code,
    )
    if options.json:
        typer.echo(json_text.dumps([asdict(score) for score in scores]))
        return
    width = max(len(score.task) for score in scores)
    typer.echo(f"{'task':{width}}  shots  {'metric':24}  score             report")
    for score in scores:
        error = "" if score.error is None else f" ± {100 * score.error:.1f}"
        reported = "" if score.reported is None else f"{100 * score.reported:.1f}"
        shots = "" if score.shots is None else score.shots
        typer.echo(
            f"{score.task:{width}}  {shots!s:5}  {score.metric:24}  {f'{100 * score.value:.1f}{error}':16}  {reported}"
        )


COMMANDS = (Command("evaluate", EvaluateOptions, evaluate),)
