"""The models' sizes, counted on the meta device as Megatron builds them."""

from dataclasses import dataclass
from typing import Any

import pytest

from nemo_skymoe.architecture import SKYWORK_13B, SKYWORK_MOE_146B
from nemo_skymoe.nemo import model
from nemo_skymoe.nemo.evaluate import start_single_rank
from nemo_skymoe.nemo.learning_rate import is_expert_parameter
from nemo_skymoe.ranks import run_ranks


@dataclass
class Count:
    """Numbers of parameters."""

    total: int
    embeddings: int
    experts: int
    activated: int


def count(name: str, vocabulary: int) -> Count:
    config: Any = getattr(model, name)(vocab_size=vocabulary, init_model_with_meta_device=True)
    config.perform_initialization = False
    built: Any = config.configure_model(tokenizer=None, pre_process=True, post_process=True)
    sizes = {name: parameter.numel() for name, parameter in built.named_parameters()}
    total, experts = (
        sum(sizes.values()),
        sum(size for name, size in sizes.items() if is_expert_parameter(name, None)),
    )
    idle = experts * (1 - config.moe_router_topk / config.num_moe_experts) if experts else 0
    embeddings = sum(size for name, size in sizes.items() if "embedding" in name or "output_layer" in name)
    return Count(total, embeddings, experts, round(total - idle))


NAMES = {
    "Skywork13BConfig": 65519,
    "SkyworkMoE146BConfig": 65536,
    "Skywork300MConfig": 65536,
    "SkyworkMoE300MX8Config": 65536,
    "SkyworkMoE2p5BConfig": 65536,
    "SkyworkMoE1p8BConfig": 65536,
    "Skywork1p3BConfig": 65536,
    "SkyworkMoE1p3BX8Config": 65536,
}


def count_all() -> dict[str, Count]:
    start_single_rank()
    return {name: count(name, vocabulary) for name, vocabulary in NAMES.items()}


@pytest.fixture(scope="module")
def counts() -> dict[str, Count]:
    return run_ranks(count_all, 1)[0]


def test_the_large_models_have_the_reports_sizes(counts: dict[str, Count]) -> None:
    dense, moe = counts["Skywork13BConfig"], counts["SkyworkMoE146BConfig"]
    assert dense.total == dense.activated == SKYWORK_13B.parameters == 13_854_113_280
    assert moe.total == SKYWORK_MOE_146B.parameters == 146_356_167_168
    assert moe.activated == SKYWORK_MOE_146B.activated_parameters
    assert round(moe.activated / 1e9, 2) == 22.69


def test_the_experiments_have_the_sizes_that_they_are_named_after(counts: dict[str, Count]) -> None:
    def billions(name: str) -> float:
        return round((counts[name].total - counts[name].embeddings / 2) / 1e9, 1)

    assert billions("Skywork300MConfig") == 0.3
    assert billions("Skywork1p3BConfig") == 1.3
    assert billions("SkyworkMoE2p5BConfig") == 2.5
    moe = counts["SkyworkMoE1p8BConfig"]
    assert round((moe.total - moe.embeddings) / 1e9, 1) == 1.8
    assert round((moe.activated - moe.embeddings) / 1e6) == 142


def test_the_experts_share_is_the_reports_97_percent(counts: dict[str, Count]) -> None:
    """Appendix C.1 says 97% without its formula; without embeddings 16 experts have it, 32 have more."""

    def share(name: str) -> float:
        return counts[name].experts / (counts[name].total - counts[name].embeddings)

    assert round(share("SkyworkMoE146BConfig"), 3) == 0.970
    assert round(share("SkyworkMoE2p5BConfig"), 3) == 0.968
    assert round(share("SkyworkMoE1p8BConfig"), 3) == 0.984


def trained_under_train_only_ffn() -> set[str]:
    start_single_rank()
    config = model.Skywork1p3BConfig(
        vocab_size=65536, init_model_with_meta_device=True, num_layers=2, train_only_ffn=True
    )
    config.perform_initialization = False
    built = model.SkyworkModel(config)
    built.configure_model()
    return {name for name, parameter in built.module.named_parameters() if parameter.requires_grad}


def test_train_only_ffn_leaves_the_mlps_weights() -> None:
    [trained] = run_ranks(trained_under_train_only_ffn, 1)
    assert trained == {
        f"decoder.layers.{layer}.mlp.linear_{fc}.weight" for layer in (0, 1) for fc in ("fc1", "fc2")
    }
