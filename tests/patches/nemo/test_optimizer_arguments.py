"""NeMo's optimizer by NeMo's own call: every megatron-core gives a parameter the same rate and weight decay.

0.14 and 0.15 take NeMo's arguments as they are and so say what is right; 0.16 fails without the patch and agrees
with it. The pinned environment has 0.15; `make compat` runs this module with the others.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.optimizer.optimizer import param_group_identifier_keys
from nemo.lightning._strategy_lib import setup_megatron_optimizer

from nemo_skymoe.nemo.learning_rate import is_expert_parameter
from nemo_skymoe.patches import cpu_runtime, optimizer_arguments
from nemo_skymoe.ranks import RankFailed, run_ranks
from tests.cases import every
from tests.patches.tiny_gpt import VERSION, Case, Run, groups

LR, DECAY, EXPERTS_LR = 1e-2, 0.1, 2.5e-3
needs_016 = pytest.mark.skipif(
    VERSION != "0.16", reason=f"megatron-core {VERSION} takes NeMo's arguments: see `make compat`"
)


class Model(list[Any]):
    """Megatron's chunks as NeMo's MegatronParallel holds them."""

    ddp_config = DistributedDataParallelConfig()


def is_embedding(name: str, parameter: torch.nn.Parameter) -> bool:
    return "embedding" in name


def nemos_groups(patched: bool, distributed: bool, arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """The parameter groups that NeMo makes, their parameters by name, or by number if they are shards."""
    cpu_runtime.apply()
    with groups(Case(experts=2)):
        chunks = Run(Case(experts=2, distributed=distributed)).chunks
        if patched:
            assert optimizer_arguments.apply() == (VERSION == "0.16")
            assert not optimizer_arguments.apply()
        config = OptimizerConfig(
            optimizer="adam", lr=LR, weight_decay=DECAY, use_distributed_optimizer=distributed
        )
        model = Model(SimpleNamespace(module=chunk) for chunk in chunks)
        optimizer = setup_megatron_optimizer(model, config, **arguments)
        names = {id(parameter): name for name, parameter in chunks[0].named_parameters()}
        return [
            {
                **group,
                "params": [names.get(id(p), str(number)) for number, p in enumerate(group["params"])],
            }
            for group in optimizer.mcore_optimizer.param_groups
        ]


def rates(found: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """Learning rate and weight decay of every parameter."""
    return {name: (group["lr"], group["weight_decay"]) for group in found for name in group["params"]}


def expected(name: str, arguments: dict[str, Any]) -> tuple[float, float]:
    expert = ".mlp.experts." in name and "scale_lr_cond" in arguments
    vector = "layernorm" in name
    spared = "embedding" in name if "no_weight_decay_cond" in arguments else vector
    return (EXPERTS_LR if expert else LR), (0.0 if spared else DECAY)


SCALED = {"scale_lr_cond": is_expert_parameter, "lr_mult": EXPERTS_LR / LR}
SPARED = {"no_weight_decay_cond": is_embedding}


@needs_016
@every("arguments", [{}, SCALED], ids=["plain", "experts"])
def test_nemo_fails_without_the_patch(arguments: dict[str, Any]) -> None:
    with pytest.raises(RankFailed, match="unexpected keyword argument 'no_weight_decay_cond'"):
        run_ranks(nemos_groups, 1, False, False, arguments)


@every("arguments", [{}, SCALED, SPARED, SCALED | SPARED], ids=["plain", "experts", "decay", "both"])
def test_every_parameter_has_its_rate_and_weight_decay(arguments: dict[str, Any]) -> None:
    [found] = run_ranks(nemos_groups, 1, True, False, arguments)
    by_name = rates(found)
    assert by_name == {name: pytest.approx(expected(name, arguments)) for name in by_name}
    kinds = ("embedding", ".mlp.experts.", ".router.", "layernorm", "output_layer")
    assert [kind for kind in kinds if not any(kind in name for name in by_name)] == []


@every("multiplier", [1.0, 0.25])
@every("distributed", [False, True])
def test_megatron_can_tell_the_groups_of_a_checkpoint_apart(distributed: bool, multiplier: float) -> None:
    """It finds a saved group by these keys: two groups with the same would load one's parameters for both's."""
    arguments = SCALED | {"lr_mult": multiplier}
    [found] = run_ranks(nemos_groups, 1, True, distributed, arguments)
    keys = [
        tuple(group.get(key, group.get(f"pre_{key}")) for key in param_group_identifier_keys)
        for group in found
    ]
    assert len(set(keys)) == len(keys)
    assert {group["lr"] for group in found} == {LR, LR * multiplier}


@needs_016
def test_megatrons_own_call_is_left_as_it_is() -> None:
    def own() -> list[float]:
        cpu_runtime.apply()
        assert optimizer_arguments.apply()
        from megatron.core.optimizer import ParamKey, get_megatron_optimizer

        with groups(Case()):
            chunks = Run(Case()).chunks
            overrides = {ParamKey(name="*embedding*"): {"wd_mult": 0.5}}
            config = OptimizerConfig(optimizer="adam", lr=LR)
            optimizer = get_megatron_optimizer(config, chunks, config_overrides=overrides)
            return sorted(group["wd_mult"] for group in optimizer.param_groups)

    assert run_ranks(own, 1) == [[0.5, 1.0]]
