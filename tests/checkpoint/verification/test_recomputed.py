"""The verifier's own formulas give the writer's tensors bit for bit, and it sees whatever is off."""

from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from nemo_skymoe.architecture import Architecture
from nemo_skymoe.checkpoint.tensors.model import MLP_KINDS, Key, Weights
from nemo_skymoe.checkpoint.upcycling.options import Upcycling
from nemo_skymoe.checkpoint.upcycling.upcycled import Upcycled
from nemo_skymoe.checkpoint.verification.bits import different
from nemo_skymoe.checkpoint.verification.comparison import Comparison, compare
from nemo_skymoe.checkpoint.verification.recomputed import Recomputed
from tests.checkpoint.fakes import DictWeights, random_weights

SIZES = Architecture(2, 32, 48, 4, vocab_size=40, num_query_groups=2)
INITIALISATIONS: list[dict[str, Any]] = [
    {"init": "copy"},
    {"init": "noise", "noise": 0.3},
    {"init": "noise", "noise": 0.0},
    {"init": "drop", "drop_ratio": 0.3},
    {"init": "drop", "drop_ratio": 0.0},
    {"init": "granular", "granularity": 2},
    {"init": "specialized", "expert_source": (("other", 3), ("base", 1))},
]


class Model:
    """Weights as the verifier sees a model."""

    def __init__(self, weights: Weights):
        self.weights = weights

    def tensor(self, kind: str, layer: int | None = None, expert: int | None = None) -> Tensor:
        return self.weights.read(Key(kind, layer, expert))


def sources(dtype: torch.dtype, architecture: Architecture = SIZES) -> dict[str, DictWeights]:
    base = random_weights(architecture, dtype)
    other = random_weights(architecture, dtype, seed=1)
    mlps = {key: value for key, value in other.values.items() if key.kind in MLP_KINDS}
    return {"base": base, "other": DictWeights(architecture, base.values | mlps)}


def compared(options: dict[str, Any], dtype: torch.dtype = torch.bfloat16, **sizes: Any) -> Comparison:
    chosen = Upcycling(4, seed=2**63 + 5, router_std=0.3, **options)
    given = sources(dtype, replace(SIZES, **sizes))
    if options["init"] != "specialized":
        del given["other"]
    moe = Upcycled(given, chosen)
    models = {name: Model(weights) for name, weights in given.items()}
    return compare(Recomputed(models, asdict(chosen)), Model(moe), moe.architecture)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("options", INITIALISATIONS, ids=lambda options: "-".join(map(str, options.values())))
def test_both_paths_agree(options: dict[str, Any], dtype: torch.dtype):
    result = compared(options, dtype)
    experts = 8 if options["init"] == "granular" else 4
    assert (result.problems, result.tensors) == ([], 3 + 2 * (7 + 3 * experts))


@pytest.mark.parametrize("options", INITIALISATIONS[1:4:2], ids=str)
def test_both_paths_agree_on_matrices_of_several_blocks(options: dict[str, Any]):
    result = compared(options, num_layers=1, hidden_size=1100, ffn_hidden_size=1000, num_attention_heads=2)
    assert result.problems == []


def test_different_sees_every_bit_and_takes_nan_for_itself():
    ours = torch.randn(3, 5).bfloat16()
    ours[1, 2] = torch.nan
    assert different(ours, ours.clone()) == ""
    for bit in range(16):
        theirs = ours.clone()
        theirs.view(torch.int16)[2, 4] ^= -(1 << 15) if bit == 15 else 1 << bit
        assert different(ours, theirs).startswith("1 of 15 elements differ, the first at [2, 4]: ")
    assert different(torch.zeros(2), -torch.zeros(2)) != ""
    assert different(ours, ours.float()) == "[3, 5] of torch.float32, expected [3, 5] of torch.bfloat16"
    assert different(ours, ours.T) == "[5, 3] of torch.bfloat16, expected [3, 5] of torch.bfloat16"


@pytest.mark.parametrize("changed", ["seed", "noise", "router_std"])
def test_another_option_is_seen(changed: str):
    given = {"base": sources(torch.bfloat16)["base"]}
    options = Upcycling(4, init="noise", noise=0.3)
    other = replace(options, **{changed: 1 if changed == "seed" else 0.2})
    moe = Upcycled(given, options)
    result = compare(Recomputed({"base": Model(given["base"])}, asdict(other)), Model(moe), moe.architecture)
    kinds = {problem.split()[0] for problem in result.problems}
    expected = {"seed": {"router", *MLP_KINDS}, "noise": set(MLP_KINDS), "router_std": {"router"}}
    assert kinds == expected[changed]
