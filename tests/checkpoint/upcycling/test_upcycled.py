"""Upcycling as weights computed while they are read: what each initialisation does, and what is refused."""

import calendar
from dataclasses import replace
from math import floor, sqrt
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nemo_skymoe.architecture import Architecture
from nemo_skymoe.checkpoint.tensors.model import MLP_KINDS, Key, Weights, key_shape
from nemo_skymoe.checkpoint.upcycling.initialization import Drop
from nemo_skymoe.checkpoint.upcycling.options import Upcycling, parse_expert_source
from nemo_skymoe.checkpoint.upcycling.upcycled import Upcycled, check_same_base
from nemo_skymoe.config import ConfigurationError
from tests.checkpoint.fakes import DictWeights, random_weights
from tests.checkpoint.reference_decoder import logits

SIZES = Architecture(4, 32, 48, 4, vocab_size=256, num_query_groups=2)
TEXT = torch.tensor(list(Path(calendar.__file__).read_bytes()[:256]))
PRESERVING: list[dict[str, Any]] = [
    {"init": "copy"},
    {"init": "noise", "noise": 0.0},
    {"init": "drop", "drop_ratio": 0.0},
    {"init": "granular", "granularity": 2},
    {"init": "granular", "granularity": 4, "moe_router_topk": 8},
]


def dense(
    architecture: Architecture = SIZES, dtype: torch.dtype = torch.float32, seed: int = 0
) -> DictWeights:
    """Matrices N(0, 1/in) and norms around 1, as of a model, where the function is compared."""
    weights = random_weights(architecture, dtype, seed)
    for key, value in weights.values.items():
        weights.values[key] = value * 0.1 + 1 if value.ndim == 1 else value / sqrt(value.shape[1])
    return weights


def upcycled(weights: Weights, **options: Any) -> Upcycled:
    chosen: dict[str, Any] = {"num_experts": 4} | options
    return Upcycled({"base": weights}, Upcycling(**chosen))


@pytest.mark.parametrize("logit_norm", [False, True], ids=["softmax", "logit-norm"])
@pytest.mark.parametrize("options", PRESERVING, ids=lambda options: "-".join(map(str, options.values())))
def test_function_is_preserved(options: dict[str, Any], logit_norm: bool):
    source = dense()
    expected = logits(source, TEXT)
    found = logits(upcycled(source, **options), TEXT, logit_norm)
    assert (found - expected).abs().max() / expected.abs().max() <= 1e-6


def test_function_is_preserved_through_24_layers():
    source = dense(replace(SIZES, num_layers=24))
    expected = logits(source, TEXT)
    for options in PRESERVING:
        difference = (logits(upcycled(source, **options), TEXT) - expected).abs().max()
        assert difference / expected.abs().max() <= 1e-5, options


@pytest.mark.parametrize("options", [{"init": "noise", "noise": 0.1}, {"init": "drop", "drop_ratio": 0.5}])
def test_the_comparison_sees_a_changed_function(options: dict[str, Any]):
    source = dense()
    expected = logits(source, TEXT)
    assert (logits(upcycled(source, **options), TEXT) - expected).abs().max() > 1e-2 * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [*PRESERVING, {"init": "drop", "drop_ratio": 0.5}], ids=str)
def test_every_tensor_has_the_announced_shape_and_type(options: dict[str, Any], dtype: torch.dtype):
    moe = upcycled(dense(dtype=dtype), **options)
    for key in moe.keys():  # noqa: SIM118
        tensor, info = moe.read(key), moe.info(key)
        assert (tuple(tensor.shape), str(tensor.dtype)) == (info.shape, f"torch.{info.dtype}"), key
        assert tensor.is_contiguous(), key
        assert info.shape == key_shape(moe.architecture, key)


def test_the_rest_is_the_dense_models_and_experts_are_copies():
    source = dense(dtype=torch.bfloat16)
    moe = upcycled(source)
    for key in moe.keys():  # noqa: SIM118
        if key.kind != "router":
            assert torch.equal(moe.read(key), source.read(Key(key.kind, key.layer))), key


def test_routers_are_drawn_and_the_same_for_every_initialisation():
    source = dense()
    routers = [
        upcycled(source, router_std=0.5, **options).read(Key("router", 1))
        for options in (*PRESERVING[:3], {"init": "copy"})
    ]
    assert all(torch.equal(router, routers[0]) for router in routers)
    granular = upcycled(source, router_std=0.5, init="granular", granularity=2).read(Key("router", 1))
    assert torch.equal(granular[0::2], routers[0]) and torch.equal(granular[1::2], routers[0])
    assert not torch.equal(upcycled(source, router_std=0.5).read(Key("router", 2)), routers[0])
    assert not torch.equal(upcycled(source, router_std=0.5, seed=1).read(Key("router", 1)), routers[0])
    large = upcycled(dense(Architecture(1, 4096, 8, 4, 8)), router_std=0.5).read(Key("router", 0))
    assert abs(large.std().item() - 0.5) < 0.01 and abs(large.mean().item()) < 0.02


def test_noise_is_relative_to_each_matrix_and_differs_everywhere():
    source = dense(Architecture(2, 512, 768, 4, 8))
    source.values[Key("up", 1)] *= 100
    moe = upcycled(source, init="noise", noise=0.25)
    seen: list[Tensor] = []
    for layer in range(2):
        for kind in MLP_KINDS:
            matrix = source.values[Key(kind, layer)]
            for expert in (0, 3):
                noise = (moe.read(Key(kind, layer, expert)) - matrix) / matrix.std()
                assert abs(noise.mean().item()) < 0.002
                assert noise.std().item() == pytest.approx(0.25, rel=0.01)
                seen.append(noise.flatten())
    correlations = torch.corrcoef(torch.stack(seen)).fill_diagonal_(0)
    assert correlations.abs().max() < 0.01


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 1.0])
def test_drop_redraws_one_set_of_indices_in_all_three_matrices(ratio: float):
    source = dense(Architecture(2, 512, 96, 4, 8))
    moe = upcycled(source, init="drop", drop_ratio=ratio)
    sets = []
    for layer in range(2):
        for expert in range(4):
            changed = {
                kind: (moe.read(Key(kind, layer, expert)) != source.values[Key(kind, layer)])
                for kind in MLP_KINDS
            }
            changed["down"] = changed["down"].T
            rows = [frozenset(changed[kind].any(1).nonzero().flatten().tolist()) for kind in MLP_KINDS]
            assert rows[0] == rows[1] == rows[2]
            assert len(rows[0]) == floor(ratio * 96)
            assert all(changed[kind][list(rows[0])].float().mean() > 0.999 for kind in MLP_KINDS if rows[0])
            sets.append(rows[0])
    assert len(set(sets)) == (8 if 0 < ratio < 1 else 1)


def test_what_drop_redraws_has_the_matrix_statistics():
    source = dense(Architecture(1, 768, 512, 4, 8))
    for number, kind in enumerate(MLP_KINDS):
        source.values[Key(kind, 0)] += 0.01 * (number + 1)
    moe = upcycled(source, init="drop", drop_ratio=0.5)
    indices = Drop(source, 0.5, 0).dropped(0, 2)
    for kind in MLP_KINDS:
        matrix, expert = source.values[Key(kind, 0)], moe.read(Key(kind, 0, 2))
        redrawn = expert[:, indices] if kind == "down" else expert[indices]
        assert redrawn.std().item() == pytest.approx(matrix.std().item(), rel=0.01)
        assert redrawn.mean().item() == pytest.approx(matrix.mean().item(), abs=0.01 * matrix.std().item())


def test_granular_parts_make_up_the_dense_mlp():
    source = dense(dtype=torch.bfloat16)
    moe = upcycled(source, init="granular", granularity=4, moe_router_topk=4)
    assert (moe.architecture.num_moe_experts, moe.architecture.ffn_hidden_size) == (16, 12)
    for copy in range(4):
        parts = {kind: [moe.read(Key(kind, 3, copy * 4 + part)) for part in range(4)] for kind in MLP_KINDS}
        assert torch.equal(torch.cat(parts["gate"]), source.values[Key("gate", 3)])
        assert torch.equal(torch.cat(parts["up"]), source.values[Key("up", 3)])
        assert torch.equal(torch.cat(parts["down"], dim=1) / 4, source.values[Key("down", 3)])


def specialists() -> dict[str, DictWeights]:
    sources = {name: dense(seed=seed) for seed, name in enumerate(("base", "zh", "en", "code"))}
    for source in sources.values():
        for key, value in sources["base"].values.items():
            if key.kind not in MLP_KINDS:
                source.values[key] = value
    return sources


SPECIALIZED = Upcycling(8, init="specialized", expert_source=parse_expert_source("zh:3,en:3,code:1,base:1"))


def test_specialised_experts_are_their_sources():
    sources = specialists()
    check_same_base(sources)
    moe = Upcycled(sources, SPECIALIZED)
    for expert, name in enumerate(("zh", "zh", "zh", "en", "en", "en", "code", "base")):
        for kind in MLP_KINDS:
            assert torch.equal(moe.read(Key(kind, 2, expert)), sources[name].values[Key(kind, 2)])
    assert torch.equal(moe.read(Key("query", 2)), sources["base"].values[Key("query", 2)])


def test_specialised_sources_differ_in_their_mlps_alone():
    sources = specialists()
    value = sources["en"].values[Key("key", 3)] = sources["base"].values[Key("key", 3)].clone()
    value.view(torch.int32)[5, 7] ^= 1
    with pytest.raises(ConfigurationError, match=r"'en' differs from 'base' in key of layer 3:"):
        check_same_base(sources)


def test_equal_bits_are_equal_also_where_they_are_nan():
    sources = specialists()
    sources["base"].values[Key("key", 3)][0] = torch.nan
    sources["en"].values[Key("key", 3)] = sources["base"].values[Key("key", 3)].clone()
    check_same_base(sources)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"init": "magic"}, "init is 'magic', expected one of copy, noise, drop, granular, specialized"),
        ({"num_experts": 1}, "num_experts is 1, expected at least 2"),
        ({"moe_router_topk": 5}, "moe_router_topk is 5, expected 1 to 4"),
        ({"moe_router_topk": 0}, "moe_router_topk is 0"),
        ({"router_std": 0.0}, "router_std is 0.0, expected more than 0"),
        ({"router_std": float("nan")}, "router_std is nan"),
        ({"seed": -1}, "seed is -1"),
        ({"init": "noise"}, "init is noise, expected a value of the option noise"),
        ({"init": "noise", "noise": -0.1}, "noise is -0.1"),
        ({"noise": 0.1}, "noise belongs to init noise, but init is copy"),
        ({"init": "drop", "drop_ratio": 1.5}, "drop_ratio is 1.5, expected 0 to 1"),
        ({"init": "drop", "drop_ratio": 0.5, "noise": 0.5}, "noise belongs to init noise"),
        ({"init": "granular", "granularity": 3}, "granularity is 3, expected a power of two"),
        ({"init": "granular", "granularity": 1}, "granularity is 1"),
        ({"init": "granular", "granularity": 4}, "moe_router_topk is 2, expected a multiple of granularity"),
        (
            {"init": "granular", "granularity": 32, "moe_router_topk": 32},
            "expected a divisor of ffn_hidden_size",
        ),
        ({"init": "specialized"}, "init is specialized, expected a value of the option expert_source"),
        ({"init": "specialized", "expert_source": (("a", 3),)}, "counts 3 experts, expected num_experts"),
        ({"init": "specialized", "expert_source": (("a", 4),)}, "no source 'a': give it as a=PATH"),
        ({"init": "specialized", "expert_source": (("a", 2), ("a", 2))}, "names a source twice"),
        ({"init": "specialized", "expert_source": (("a", 0), ("base", 4))}, "gives 'a' 0 experts"),
    ],
)
def test_refused_options(options: dict[str, Any], message: str):
    with pytest.raises(ConfigurationError, match=message):
        upcycled(dense(), **options)


@pytest.mark.parametrize("text", ["", "zh", "zh:", ":3", "zh:x", "zh:3,,en:1", "zh:-1"])
def test_refused_expert_sources(text: str):
    with pytest.raises(ConfigurationError, match="expected NAME:COUNT"):
        parse_expert_source(text)


def test_refused_sources():
    options = Upcycling(4, init="specialized", expert_source=(("a", 2), ("base", 2)))
    base = dense()
    for other, message in (
        (dense(replace(SIZES, ffn_hidden_size=96)), "expected the sizes of 'base'"),
        (dense(dtype=torch.bfloat16), "as bfloat16, 'base' as float32"),
        (dense(SIZES.with_experts(4)), "'a' is an MoE already"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            Upcycled({"base": base, "a": other}, options)
    with pytest.raises(ConfigurationError, match="'a' is used by no expert"):
        Upcycled({"base": base, "a": base}, Upcycling(4))


def test_noise_has_no_scale_where_the_matrix_is_not_finite():
    source = dense()
    source.values[Key("up", 1)][3, 5] = torch.inf
    moe = upcycled(source, init="noise", noise=0.1)
    with pytest.raises(ConfigurationError, match="up of layer 1 has NaN or infinite weights"):
        moe.read(Key("up", 1, 0))
