"""Check the adapters of a Skywork-MoE before a training of Bridge begins: each would train silently wrongly otherwise."""

from collections.abc import Iterator
from typing import Any

from megatron.bridge.peft.lora import LoRA
from torch import nn

from nemo_skymoe.config import ConfigurationError

_LINEAR = nn.Linear(1, 1, device="meta")
_EXPECTED = "linear_qkv, linear_proj, linear_fc1 and linear_fc2, or some of them"


def check_adapters(peft: Any, model: Any, expert_tensor_parallel: int) -> None:
    """Refuse adapters whose outputs or gradients are not those of one rank.

    Bridge (0.6, peft/utils.py) keeps an adapter for every expert where it belongs, under any expert parallelism. But it
    gathers the output of an adapter over the ranks that share an expert, whose outputs the dispatcher adds up then, and
    over the ranks of sequence parallelism, whose routers have other tokens.

    Args:
        peft: Bridge's adapters; None for a training of all weights.
        model: The provider of a Skywork-MoE.
        expert_tensor_parallel: Ranks that share an expert.

    Raises:
        ConfigurationError: The message names the option and what was expected.
    """
    if peft is None:
        return
    if model.moe_adaptive_aux_loss:
        raise ConfigurationError(
            "moe_adaptive_aux_loss balances a router, which peft freezes: expected False, with"
            " moe_router_load_balancing_type='none'"
        )
    if type(peft) is not LoRA:
        raise ConfigurationError(
            f"peft is {type(peft).__name__}, expected LoRA: no other adapters of a Skywork-MoE were compared with one rank"
        )
    if any(peft.match(nn.Module(), "router", mlp) for mlp in _mlps(model)):
        raise ConfigurationError(
            f"peft.target_modules is {peft.target_modules}, which takes in the router: its adapter would mix the tokens of"
            f" different ranks, expected {_EXPECTED}"
        )
    if expert_tensor_parallel > 1 and any(peft.match(_LINEAR, *linear) for linear in _expert_linears(model)):
        raise ConfigurationError(
            f"peft.target_modules is {peft.target_modules} with model.expert_tensor_parallel_size="
            f"{expert_tensor_parallel}: Bridge counts the adapters of an expert once for each rank that shares it;"
            " expected 1, or linear_qkv and linear_proj alone"
        )


def _mlps(model: Any) -> Iterator[str]:
    for layer in range(model.num_layers):
        yield f"decoder.layers.{layer}.mlp"


def _expert_linears(model: Any) -> Iterator[tuple[str, str]]:
    """Yield name and parent of every linear layer of every expert, as Bridge finds them."""
    experts = ["experts", *(f"experts.local_experts.{number}" for number in range(model.num_moe_experts))]
    for mlp in _mlps(model):
        for expert in experts:
            for name in ("linear_fc1", "linear_fc2"):
                yield name, f"{mlp}.{expert}"
