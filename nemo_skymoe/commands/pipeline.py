"""The command of `skymoe` on pipeline layouts."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nemo_skymoe.architecture import Architecture
from nemo_skymoe.commands.front_ends import Command
from nemo_skymoe.commands.values import MODEL
from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.pipeline.texts import planned
from nemo_skymoe.pipeline.training import Training

if TYPE_CHECKING:
    from nemo_skymoe.pipeline.plans import Plan
    from nemo_skymoe.pipeline.size_search import Found


_DEFAULT = "default 1, and with --search all"


def _size(kind: str, short: str, help: str) -> Any:
    return typer.Option(f"--{kind}-parallel", f"--{short}", help=f"{help}; {_DEFAULT}.")


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Plan a pipeline.

    The command chooses which layers are on which pipeline stage, and which of them are recomputed, for the shortest
    step that fits in memory. It prints Megatron's layout and the predicted times and sizes. For the report's run:

    skymoe plan --model skywork-moe-146b --hardware A800-80G --num-gpus 1536 --tp 4 --ep 4 --pp 12
    --seq-length 8192 --global-batch-size 2048 --capacity-factor 1.25

    With --search it also chooses the parallel sizes and the micro-batch, and prints the ten best.
    """

    model: Annotated[
        Architecture,
        MODEL,
        typer.Option(
            help="skywork-13b, skywork-moe-146b, the folder of a checkpoint, or dimensions: num_layers=24,hidden_size=2048,ffn_hidden_size=5632,"
            "num_attention_heads=16,vocab_size=32000[,num_moe_experts=8,moe_router_topk=2,num_query_groups=4,moe_layer_freq=2].",
        ),
    ]
    hardware: Annotated[str, typer.Option(help="A800-80G, A100-80G, H100 or H200.")]
    seq_length: Annotated[int, typer.Option(help="Tokens of a sequence.")]
    global_batch_size: Annotated[int, typer.Option(help="Sequences of a step.")]
    num_gpus: Annotated[int | None, typer.Option(help="Number of all GPUs, or give --data-parallel.")] = None
    data_parallel: Annotated[
        int | None, typer.Option("--data-parallel", "--dp", help="Data-parallel size, instead of --num-gpus.")
    ] = None
    tensor_parallel: Annotated[int | None, _size("tensor", "tp", "Tensor-parallel size")] = None
    pipeline_parallel: Annotated[int | None, _size("pipeline", "pp", "Number of pipeline stages")] = None
    virtual_pipeline: Annotated[
        int | None,
        typer.Option(
            "--virtual-pipeline", "--vpp", help=f"Virtual stages of each pipeline stage; {_DEFAULT}."
        ),
    ] = None
    expert_parallel: Annotated[
        int | None, _size("expert", "ep", "Expert-parallel size; with EDP the same as --tp")
    ] = None
    context_parallel: Annotated[int | None, _size("context", "cp", "Ranks that share a sequence")] = None
    micro_batch_size: Annotated[int | None, typer.Option(help=f"Sequences of a micro-batch; {_DEFAULT}.")] = (
        None
    )
    sequence_parallel: Annotated[bool | None, typer.Option(help="Default: on if --tp is above 1.")] = None
    capacity_factor: Annotated[
        float | None, typer.Option(help="Capacity factor of the experts; default: dropless.")
    ] = Training.capacity_factor
    pad_to_capacity: Annotated[bool, typer.Option(help="Experts compute their whole capacity.")] = (
        Training.pad_to_capacity
    )
    overlap_grad_reduce: Annotated[bool, typer.Option(help="Hide gradient reduction behind compute.")] = (
        Training.overlap_grad_reduce
    )
    gradient_bytes: Annotated[int, typer.Option(help="Bytes of one gradient: 4 in fp32, 2 in bf16.")] = (
        Training.gradient_bytes
    )
    distributed_optimizer: Annotated[
        bool, typer.Option(help="Each data-parallel rank keeps its share of the optimizer's state.")
    ] = Training.distributed_optimizer
    recompute: Annotated[bool, typer.Option(help="Recompute layers if memory is short.")] = True
    memory_limit: Annotated[
        float | None, typer.Option(help="GB of a GPU that may be used; default: all.")
    ] = None
    layers: Annotated[
        str | None, typer.Option(help="Predict this layout instead of choosing one: 5,5,5,5,4.")
    ] = None
    search: Annotated[
        bool, typer.Option(help="Choose the sizes that are not given, and print the ten best plans.")
    ] = False
    profile: Annotated[Path | None, typer.Option(help="JSON of measured seconds and bytes of blocks.")] = None
    json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False
    svg: Annotated[Path | None, typer.Option(help="Draw the schedule into this file.")] = None
    output: Annotated[Path | None, typer.Option(help="Write the plan into this file, as JSON.")] = None


_PRINTED = ("json", "svg", "output", "search")
"""These options say what is done with a plan. All others belong to the plan itself."""


def plan(options: PlanOptions) -> None:
    """Make a plan and print it, and write or draw it if that is asked for. Of a search that is the best plan."""
    if options.svg is not None and not options.svg.parent.is_dir():
        raise ConfigurationError(f"svg is {options.svg}, expected a file in an existing folder")
    given = {name: value for name, value in vars(options).items() if name not in _PRINTED}
    found = _searched(given) if options.search else None
    made = planned(**given) if found is None else found.plans[0]
    if options.svg is not None:
        _draw(made, options.svg)
    if options.output is not None:
        _write(made, options.output)
    if found is None:
        _show(made, options.json)
    else:
        _show_found(found, options.json)


def _searched(given: dict[str, Any]) -> "Found":
    from rich.console import Console
    from rich.progress import Progress

    from nemo_skymoe.pipeline.texts import searched

    with Progress(console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task("estimating layouts", total=None)

        def advance(done: int, of: int) -> None:
            shown.update(task, description="planning layouts", completed=done, total=of)

        return searched(**given, progress=advance)


def _show_found(found: "Found", json: bool) -> None:
    if json:
        from json import dumps

        typer.echo(dumps([plan.to_dict() for plan in found.plans], indent=2))
        return
    from nemo_skymoe.pipeline.table import print_found

    print_found(found)


def _write(made: "Plan", output: Path) -> None:
    from json import dumps

    from nemo_skymoe.durable.files import write_small

    output.parent.mkdir(parents=True, exist_ok=True)
    write_small(output, (dumps(made.to_dict(), indent=2) + "\n").encode())


def _draw(made: Any, svg: Path) -> None:
    from nemo_skymoe.pipeline.drawing import draw_schedule

    try:
        figure = draw_schedule(made.simulation)
    except ModuleNotFoundError as missing:
        raise ConfigurationError(f"--svg needs {missing.name}, which is not installed") from missing
    figure.savefig(svg, format="svg", metadata={"Date": None})


def _show(made: Any, json: bool) -> None:
    if json:
        from json import dumps

        typer.echo(dumps(made.to_dict(), indent=2))
        return
    from nemo_skymoe.pipeline.table import print_plan

    print_plan(made)


PLAN = Command("plan", PlanOptions, plan)
COMMANDS = (PLAN,)
