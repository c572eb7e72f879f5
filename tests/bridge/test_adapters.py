"""LoRA in Bridge's own training: every adapter's gradient is that of one rank, in float64, or the layout is refused."""

import functools
from pathlib import Path
from typing import Any

import pytest
from megatron.bridge.peft import utils
from megatron.bridge.peft.dora import DoRA
from megatron.bridge.peft.lora import LoRA

from nemo_skymoe.bridge.checks import check
from nemo_skymoe.bridge.recipes._finetune import ADAPTED
from nemo_skymoe.bridge.training import pretrain
from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.patches import bridge_lora_without_te
from nemo_skymoe.ranks import RankFailed, run_ranks
from tests.bridge.recorded import Record, start_alike, train
from tests.bridge.test_gradients import DOUBLE, EDP, SEQUENCE_PARALLEL, Whole, forward_step
from tests.bridge.tiny import DENSE, MOE, tiny_config, tiny_provider
from tests.cases import every
from tests.moe.worlds import relative_errors

FROZEN = {
    "moe_router_load_balancing_type": "none",
    "moe_adaptive_aux_loss": False,
    "moe_expert_capacity_factor": None,
}
SHARED = SEQUENCE_PARALLEL["tensor-parallel"]
ATTENTION = ["linear_qkv", "linear_proj"]
# What is trained, the adapted layers, and the parallel sizes on two ranks.
LAYOUTS: dict[str, tuple[str, list[str], dict[str, Any]]] = {
    "all-to-all": ("moe", ADAPTED, SEQUENCE_PARALLEL["all-to-all"]),
    "all-gather": ("moe", ADAPTED, SEQUENCE_PARALLEL["all-gather"]),
    "replicated": ("moe", ADAPTED, {**EDP, "edp_dispatcher": "replicated"}),
    "pipeline": ("moe", ADAPTED, {"pipeline_model_parallel_size": 2}),
    "data-parallel": ("moe", ADAPTED, {}),
    "expert-parallel": ("moe", ADAPTED, {"expert_model_parallel_size": 2, "moe_edp": False}),
    "shared experts, attention alone": ("moe", ATTENTION, SHARED),
    "dense": ("dense", ADAPTED, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
}


def config(start: Path, layout: dict[str, Any], targets: list[str]) -> Any:
    model = tiny_provider(DENSE if start.name == "dense" else MOE, **{**DOUBLE, **FROZEN, **layout})
    made = tiny_config(
        steps=2,
        model=model,
        distributed_optimizer=False,
        overrides={"optimizer": {"clip_grad": 0.0}, "checkpoint": {"pretrained_checkpoint": str(start)}},
    )
    made.peft = LoRA(target_modules=targets, dim=4, alpha=8)
    return made


def trained(*given: Any) -> Record:
    recorder = Whole(start=start_alike)
    pretrain(config(*given), forward_step_func=forward_step, callbacks=[recorder])
    return recorder.record


def base(folder: Path) -> None:
    """A checkpoint of the model, whose weights no test looks at."""
    model = tiny_provider(DENSE if folder.name == "dense" else MOE, **DOUBLE)
    overrides = {"optimizer": {"clip_grad": 0.0}}
    train(tiny_config(folder, 1, model, distributed_optimizer=False, overrides=overrides))


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    for name in ("moe", "dense"):
        run_ranks(base, 1, folder / name)
    return folder


@functools.cache
def one_rank(start: Path, targets: tuple[str, ...]) -> Record:
    return run_ranks(trained, 1, start, {}, list(targets))[0]


@every(name=list(LAYOUTS))
def test_gradients_of_adapters_are_those_of_one_rank(name: str, bases: Path):
    model, targets, layout = LAYOUTS[name]
    expected = one_rank(bases / model, tuple(targets))
    ranks = run_ranks(trained, 2, bases / model, layout, targets)
    assert all(".adapter." in parameter for parameter in expected.gradients[0])
    assert all(gradient.any() for gradient in expected.gradients[0].values())
    for step in range(2):
        for record in ranks:
            errors = relative_errors(record.gradients[step], expected.gradients[step])
            assert {n: error for n, error in errors.items() if not error <= 1e-10} == {}


@every(
    ("peft", "layout", "message"),
    [
        (LoRA(), SHARED, "peft.target_modules is .* with model.expert_tensor_parallel_size=2: Bridge counts"),
        (LoRA(target_modules=["*.layers.1.*.experts.*.linear_fc2"]), SHARED, "expert_tensor_parallel_size=2"),
        (LoRA(target_modules=[], exclude_modules=["linear_qkv"]), SHARED, "expert_tensor_parallel_size=2"),
        (LoRA(target_modules=["linear_qkv", "router"]), SHARED, "which takes in the router"),
        (DoRA(), {}, "peft is DoRA, expected LoRA"),
        (LoRA(), {"moe_adaptive_aux_loss": True, "moe_router_load_balancing_type": "aux_loss"}, "which peft freezes"),
    ],
)  # fmt: skip
def test_adapters_that_would_be_wrong_are_refused(
    peft: Any, layout: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("WORLD_SIZE", "2")
    made = config(tmp_path, layout, ADAPTED)
    made.peft = peft
    with pytest.raises(ConfigurationError, match=message):
        check(made)


def wrong(start: Path, targets: list[str], monkeypatch: pytest.MonkeyPatch) -> Record:
    monkeypatch.setattr("nemo_skymoe.bridge.options_check.check_adapters", lambda *_: None)
    return trained(start, SHARED, targets)


def test_what_is_refused_is_wrong(bases: Path, monkeypatch: pytest.MonkeyPatch):
    """Ranks that share an expert: already the first loss is not that of one rank."""
    targets = ["linear_fc2"]
    found = run_ranks(wrong, 2, bases / "moe", targets, monkeypatch)[0].losses[0]
    assert abs(found - one_rank(bases / "moe", tuple(targets)).losses[0]) > 0.01


def test_bridge_alone_needs_transformer_engine_for_adapters(bases: Path, monkeypatch: pytest.MonkeyPatch):
    """What patches/bridge_lora_without_te.py cures."""
    assert not bridge_lora_without_te.apply()  # the import of nemo_skymoe.bridge did
    monkeypatch.setattr(utils, "HAVE_TE", True)
    with pytest.raises(RankFailed, match="TypeError: isinstance"):
        run_ranks(trained, 1, bases / "moe", {}, ADAPTED)
