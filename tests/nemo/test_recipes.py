"""The recipes as NeMo-Run sees them, and what `pretrain` refuses before anything is built."""

import logging
import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fiddle as fdl
import pytest
from nemo_run.core.serialization.zlib_json import ZlibJSONSerializer

from nemo_skymoe.checkpoint import torch_dist
from nemo_skymoe.checkpoint.upcycle import upcycle
from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.nemo import api
from nemo_skymoe.nemo.checkpoint import check_architecture
from nemo_skymoe.nemo.corpus import build_corpus
from nemo_skymoe.nemo.evaluate import start_single_rank
from nemo_skymoe.nemo.model import (
    Skywork13BConfig,
    SkyworkMoE146BConfig,
    SkyworkMoETinyConfig,
    SkyworkTinyConfig,
)
from nemo_skymoe.ranks import run_ranks
from nemo_skymoe.recipes import skywork_moe_146b, skywork_moe_tiny, skywork_tiny
from tests.checkpoint.test_upcycle import HIDDEN, LAYERS, NUM_EXPERTS, dense

RECIPES = {
    "skywork_tiny": skywork_tiny,
    "skywork_moe_tiny": skywork_moe_tiny,
    "skywork_moe_146b": skywork_moe_146b,
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_survive_serialisation(name: str) -> None:
    recipe = RECIPES[name].pretrain_recipe()
    serializer = ZlibJSONSerializer()
    assert serializer.deserialize(serializer.serialize(recipe)) == recipe


def test_the_entry_point_leads_to_the_factories() -> None:
    (entry,) = [point for point in entry_points(group="nemo_run.cli") if point.name == "skymoe"]
    module = entry.load()
    assert all(hasattr(module, name) for name in RECIPES)


@pytest.mark.parametrize(("name", "size"), [("skywork_moe_tiny", 2), ("skywork_moe_146b", 4)])
def test_edp_is_the_default_of_the_moe(name: str, size: int) -> None:
    strategy = RECIPES[name].pretrain_recipe().trainer.strategy
    assert strategy.tensor_model_parallel_size == strategy.expert_model_parallel_size == size
    assert strategy.expert_tensor_parallel_size == 1 and strategy.sequence_parallel
    assert fdl.build(RECIPES[name].model().config).moe_edp


def parameters_on_the_meta_device() -> tuple[int, int]:
    start_single_rank()
    counts = []
    for config in (Skywork13BConfig(), SkyworkMoE146BConfig()):
        config.vocab_size, config.init_model_with_meta_device = 65536, True
        config.perform_initialization = False
        model = config.configure_model(tokenizer=None, pre_process=True, post_process=True)
        counts.append(sum(parameter.numel() for parameter in model.parameters()))
    return counts[0], counts[1]


def test_the_large_models_have_the_reports_sizes() -> None:
    [counts] = run_ranks(parameters_on_the_meta_device, 1, timeout=120)
    assert counts == (13_854_269_952, 146_356_167_168)


def trainer(devices: int, **sizes: int) -> Any:
    defaults = {
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "context_parallel_size": 1,
    }
    return SimpleNamespace(num_devices=devices, num_nodes=1, strategy=SimpleNamespace(**(defaults | sizes)))


def test_a_world_that_the_sizes_do_not_divide_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    api.check_world_size(trainer(4, tensor_model_parallel_size=2))
    with pytest.raises(
        ConfigurationError, match=r"is 3 ranks, expected a multiple of tensor_model_parallel_size=2"
    ):
        api.check_world_size(trainer(3, tensor_model_parallel_size=2))


def test_another_world_than_was_started_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ConfigurationError, match="is 2 ranks, 4 were started"):
        api.check_world_size(trainer(2))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            {"tensor_model_parallel_size": 4, "expert_model_parallel_size": 4},
            "num_moe_experts is 6, .*multiple of expert_model_parallel_size = 4",
        ),
        (
            {"tensor_model_parallel_size": 2},
            "expert_model_parallel_size is 1, expected tensor_model_parallel_size",
        ),
        ({"expert_tensor_parallel_size": 2}, "expert_tensor_parallel_size is 2"),
    ],
)
def test_parallel_sizes_that_do_not_fit_are_refused_by_name(sizes: dict[str, int], message: str) -> None:
    strategy = fdl.build(skywork_moe_tiny.pretrain_recipe(edp=1, devices=1).trainer.strategy)
    config = SkyworkMoETinyConfig(num_moe_experts=6)
    api.check_parallel_sizes(config, strategy)
    for option, size in sizes.items():
        setattr(strategy, option, size)
    with pytest.raises(ConfigurationError, match=message):
        api.check_parallel_sizes(config, strategy)


def test_a_missing_checkpoint_is_answered_with_the_command(tmp_path: Path) -> None:
    resume = SimpleNamespace(restore_config=SimpleNamespace(path=str(tmp_path / "nothing")))
    with pytest.raises(ConfigurationError, match="`skymoe demo` makes one"):
        api.check_warm_start(resume, SkyworkTinyConfig())


def test_a_warm_up_as_long_as_the_run_is_shortened() -> None:
    optim = SimpleNamespace(lr_scheduler=SimpleNamespace(warmup_steps=20))
    api.shorten_warmup(optim, 21)
    assert optim.lr_scheduler.warmup_steps == 20
    api.shorten_warmup(optim, 20)
    assert optim.lr_scheduler.warmup_steps == 2


def test_checkpoints_of_another_architecture_are_refused(tmp_path: Path) -> None:
    torch_dist.write_weights(tmp_path / "dense", dense())
    torch_dist.write_weights(tmp_path / "moe", upcycle(dense(), NUM_EXPERTS))
    sizes = {"num_layers": LAYERS, "hidden_size": HIDDEN, "num_attention_heads": 2}
    plain, experts = SkyworkTinyConfig(**sizes), SkyworkMoETinyConfig(**sizes, num_moe_experts=NUM_EXPERTS)
    check_architecture(tmp_path / "dense", plain)
    check_architecture(tmp_path / "moe", experts)
    for folder, config, message in (
        ("dense", experts, "is dense, expected 4 experts: upcycle it first"),
        ("moe", plain, "is an MoE, expected a dense model"),
        ("moe", SkyworkMoETinyConfig(**sizes, num_moe_experts=8), "num_moe_experts is 8, .* has 4"),
        ("dense", SkyworkTinyConfig(**(sizes | {"num_layers": 5})), "num_layers is 5, .* has 3"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            check_architecture(tmp_path / folder, config)


def test_nemo_llm_pretrain_runs_the_recipe_on_two_torchrun_ranks(tmp_path: Path) -> None:
    """The command line a user types, as a process of its own."""
    files = [
        "argparse.py",
        "typing.py",
        "inspect.py",
        "pydoc.py",
        "shutil.py",
        "uuid.py",
        "ast.py",
        "pickle.py",
    ]
    build_corpus(tmp_path / "runs" / "corpus", 512, 0.3, files=files)
    binaries = Path(sys.executable).parent
    process = subprocess.run(
        [
            binaries / "nemo",
            "llm",
            "pretrain",
            "--factory",
            "skywork_moe_tiny",
            "--yes",
            "run.executor=torchrun",
            "trainer.max_steps=3",
            "trainer.limit_val_batches=1",
            "data.seq_length=64",
            "model.config.seq_length=64",
        ],
        cwd=tmp_path,
        env=os.environ
        | {"PATH": f"{binaries}:{os.environ['PATH']}", "NEMORUN_HOME": str(tmp_path / "nemo_run")},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-3000:]
    assert list((tmp_path / "runs" / "skywork_moe_tiny" / "checkpoints").glob("*-last")), process.stdout[
        -3000:
    ]


def test_what_the_package_says_reaches_nemos_log(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(api.logging, "info", said.append)
    monkeypatch.setattr(api.logging, "warning", said.append)
    api.log_through_nemo()
    api.log_through_nemo()
    logging.getLogger("nemo_skymoe.moe.edp").info("chosen")
    logging.getLogger("nemo_skymoe.moe.controller").warning("missing")
    assert said == ["chosen", "missing"]
