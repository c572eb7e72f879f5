"""`skymoe advise` answers whether to upcycle or to train from scratch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from nemo_skymoe.architecture import Architecture
from nemo_skymoe.commands.front_ends import Command
from nemo_skymoe.commands.values import MODEL, TOKENS, architecture_of
from nemo_skymoe.config import ConfigurationError


@dataclass(frozen=True, kw_only=True)
class AdviseOptions:
    """Decide between upcycling and training from scratch.

    The answer follows section 3.3 of the report: it compares what the dense checkpoint cost with what the MoE may
    cost. A learning-rate schedule and the evidence come with it. For the report's model, had it been upcycled for
    500B tokens from a checkpoint of 3.2T:

    skymoe advise --model skywork-moe-146b --dense-tokens 3.2T --moe-tokens 500B --hardware A800-80G
    --num-gpus 1536 --seq-length 8192 --global-batch-size 2048
    """

    moe_tokens: Annotated[int, TOKENS, typer.Option(help="Tokens of the MoE's training: 300B, 1.2T.")]
    hardware: Annotated[str, typer.Option(help="A800-80G, A100-80G, H100 or H200.")]
    num_gpus: Annotated[int, typer.Option(help="GPUs of one training.")]
    model: Annotated[
        Architecture | None,
        MODEL,
        typer.Option(
            help="The MoE: skywork-moe-146b, a folder, or dimensions as for `skymoe plan`, with num_moe_experts.",
        ),
    ] = None
    dense: Annotated[
        Path | None, typer.Option(help="Instead of --model, the folder of the dense checkpoint to upcycle.")
    ] = None
    num_experts: Annotated[int, typer.Option(help="With --dense: experts of the MoE's layers.")] = 16
    moe_router_topk: Annotated[int, typer.Option(help="With --dense: experts that see a token.")] = 2
    dense_tokens: Annotated[
        int | None,
        TOKENS,
        typer.Option(help="Tokens that the dense checkpoint has seen; default: there is no checkpoint."),
    ] = None
    dense_schedule_tokens: Annotated[
        int | None,
        TOKENS,
        typer.Option(help="Tokens of its whole learning-rate schedule; default: it is at the end."),
    ] = None
    dense_max_lr: Annotated[
        float | None,
        typer.Option(
            help="The dense model's peak learning rate; without it, rates are given as proportions."
        ),
    ] = None
    dense_min_lr: Annotated[float | None, typer.Option(help="The dense model's last learning rate.")] = None
    cost: Annotated[
        str,
        typer.Option(
            help="sunk: the dense checkpoint exists anyway; cumulative: it would be trained for this."
        ),
    ] = "sunk"
    seq_length: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 4096
    global_batch_size: Annotated[int, typer.Option(help="Sequences of a step.")] = 1024
    capacity_factor: Annotated[
        float | None, typer.Option(help="Capacity factor of the experts; default: dropless.")
    ] = None
    json: Annotated[bool, typer.Option("--json", help="Print the answer as JSON.")] = False


_OWN = ("json", "model", "dense", "num_experts", "moe_router_topk")
"""These options say how to print, and which model is meant."""


def advise(options: AdviseOptions) -> None:
    """Print the advice."""
    from nemo_skymoe.advice.advising import advise as make_advice
    from nemo_skymoe.advice.text import as_text, to_dict

    given = {name: value for name, value in vars(options).items() if name not in _OWN}
    made = make_advice(_moe(options), **given)
    if options.json:
        from json import dumps

        typer.echo(dumps(to_dict(made), indent=2))
    else:
        typer.echo(as_text(made))


def _moe(options: AdviseOptions) -> Architecture:
    if (options.model is None) == (options.dense is None):
        found = "both given" if options.dense else "both absent"
        raise ConfigurationError(f"model and dense are {found}, expected one of --model and --dense")
    if options.dense is None:
        assert options.model is not None
        return options.model
    found = architecture_of(options.dense)
    if found.num_moe_experts is not None:
        raise ConfigurationError(
            f"dense is '{options.dense}', an MoE of {found.num_moe_experts} experts, expected a dense checkpoint"
        )
    return found.with_experts(options.num_experts, options.moe_router_topk)


COMMANDS = (Command("advise", AdviseOptions, advise),)
