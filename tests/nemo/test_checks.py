"""What `pretrain` and `finetune` refuse before anything is built."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fiddle as fdl
import pytest
import torch
from nemo.collections.llm.peft import LoRA
from nemo.lightning.pytorch.callbacks.deepep import DeepEPCallback

from nemo_skymoe.architecture import Architecture
from nemo_skymoe.checkpoint.tensors.model import TensorInfo
from nemo_skymoe.checkpoint.torch_dist.fitting import check_architecture, check_sizes
from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.nemo import checks
from nemo_skymoe.nemo.learning_rate import LearningRateSchedule
from nemo_skymoe.nemo.model import SkyworkMoETinyConfig, SkyworkTinyConfig
from nemo_skymoe.patches import lora_without_te
from nemo_skymoe.ranks import RankFailed, run_ranks
from nemo_skymoe.recipes import skywork_moe_tiny
from tests.cases import every
from tests.checkpoint import megatron_files
from tests.checkpoint.fakes import random_weights


def trainer(devices: int, **sizes: int) -> Any:
    defaults = {
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "context_parallel_size": 1,
    }
    return SimpleNamespace(num_devices=devices, num_nodes=1, strategy=SimpleNamespace(**(defaults | sizes)))


def test_a_world_that_the_sizes_do_not_divide_is_refused() -> None:
    checks.check_world_size(trainer(4, tensor_model_parallel_size=2))
    with pytest.raises(
        ConfigurationError, match=r"is 3 ranks, expected a multiple of tensor_model_parallel_size=2"
    ):
        checks.check_world_size(trainer(3, tensor_model_parallel_size=2))
    experts = {"expert_model_parallel_size": 4, "expert_tensor_parallel_size": 1}
    checks.check_world_size(trainer(4, tensor_model_parallel_size=2, **experts))
    for sizes in (experts, {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2}):
        with pytest.raises(
            ConfigurationError,
            match=r"is 2 ranks, expected a multiple of expert_tensor_parallel_size=\d x expert",
        ):
            checks.check_world_size(trainer(2, **sizes))


def test_another_world_than_was_started_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="is 2 ranks, 4 were started"):
        checks.check_world_size(trainer(2), started=4)


@every(
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
    checks.check_parallel_sizes(config, strategy)
    for option, size in sizes.items():
        setattr(strategy, option, size)
    with pytest.raises(ConfigurationError, match=message):
        checks.check_parallel_sizes(config, strategy)


def test_tensor_parallelism_alone_does_not_train() -> None:
    strategy = fdl.build(skywork_moe_tiny.pretrain_recipe(edp=1, devices=1).trainer.strategy)
    strategy.tensor_model_parallel_size, strategy.expert_model_parallel_size = 2, 2
    config = SkyworkMoETinyConfig(moe_edp=False)
    with pytest.raises(
        ConfigurationError, match="sequence_parallel is False with tensor_model_parallel_size=2"
    ):
        checks.check_parallel_sizes(config, strategy)


def test_a_missing_checkpoint_is_answered_with_the_command(tmp_path: Path) -> None:
    resume = SimpleNamespace(restore_config=SimpleNamespace(path=str(tmp_path / "nothing")))
    with pytest.raises(ConfigurationError, match="`skymoe demo` makes one"):
        checks.check_warm_start(resume, SkyworkTinyConfig())


def test_schedules_follow_the_steps_that_are_really_run() -> None:
    """Warm-up and decay keep their lengths or shares, or are a tenth each of a run that they would not fit into."""
    for steps, warmup, decay in ((6000, 2000, 2384), (4000, 400, 400), (100, 10, 10), (10, 1, 1)):
        schedule = LearningRateSchedule("linear", 2000, steps, 0.1, decay_steps=2384)
        checks.follow_max_steps(SimpleNamespace(lr_scheduler=schedule), steps)
        end = steps - decay
        for step in range(0, steps + 1, max(1, steps // 100)):
            by_hand = (
                (step + 1) / (warmup + 1)
                if step <= warmup
                else 0.1 * (steps - step) / decay
                if step > end
                else 0.1 + 0.9 * (1 - (step - warmup) / (end - warmup))
            )
            assert schedule.factor(step) == pytest.approx(by_hand), (steps, step)
    nemos: Any = SimpleNamespace(warmup_steps=20, constant_steps=30, max_steps=60)
    checks.follow_max_steps(SimpleNamespace(lr_scheduler=nemos), 60)
    assert (nemos.warmup_steps, nemos.constant_steps) == (20, 30)
    checks.follow_max_steps(SimpleNamespace(lr_scheduler=nemos), 50)
    assert (nemos.warmup_steps, nemos.constant_steps) == (17, 25)
    phases = SimpleNamespace(phases=[SimpleNamespace(max_steps=4), SimpleNamespace(max_steps=6)])
    checks.follow_max_steps(SimpleNamespace(lr_scheduler=phases), 10)
    with pytest.raises(ConfigurationError, match=r"trainer\.max_steps is 9, expected the 10 of all phases"):
        checks.follow_max_steps(SimpleNamespace(lr_scheduler=phases), 9)


def test_steps_that_train_nothing_are_refused() -> None:
    checks.check_steps(SimpleNamespace(max_steps=1, accumulate_grad_batches=1))
    for steps in (-5, -1, 0, 2.5, None):
        with pytest.raises(
            ConfigurationError, match=f"trainer.max_steps is {steps}, expected a whole number"
        ):
            checks.check_steps(SimpleNamespace(max_steps=steps))
    with pytest.raises(ConfigurationError, match=r"trainer\.accumulate_grad_batches is 2, expected 1"):
        checks.check_steps(SimpleNamespace(max_steps=3, accumulate_grad_batches=2))


def test_checkpoints_of_another_architecture_are_refused(tmp_path: Path) -> None:
    dense = Architecture(
        num_layers=3, hidden_size=8, ffn_hidden_size=12, num_attention_heads=2, vocab_size=32
    )
    megatron_files.write(tmp_path / "dense", random_weights(dense), torch.float32)
    megatron_files.write(tmp_path / "moe", random_weights(dense.with_experts(4)), torch.float32)
    sizes: dict[str, Any] = {
        "num_layers": 3,
        "hidden_size": 8,
        "num_attention_heads": 2,
        "ffn_hidden_size": 12,
    }
    plain, experts = SkyworkTinyConfig(**sizes), SkyworkMoETinyConfig(**sizes, num_moe_experts=4)
    check_architecture(tmp_path / "dense", plain)
    check_architecture(tmp_path / "moe", experts)
    for folder, config, message in (
        ("dense", experts, "is dense, expected 4 experts: upcycle it first"),
        ("moe", plain, "is an MoE, expected a dense model"),
        ("moe", SkyworkMoETinyConfig(**sizes, num_moe_experts=8), "num_moe_experts is 8, .* has 4"),
        ("dense", SkyworkTinyConfig(**(sizes | {"num_layers": 5})), "num_layers is 5, .* has 3"),
        (
            "dense",
            SkyworkTinyConfig(**(sizes | {"ffn_hidden_size": 16})),
            "ffn_hidden_size is 16, which makes",
        ),
    ):
        with pytest.raises(ConfigurationError, match=message):
            check_architecture(tmp_path / folder, config)


def test_layers_that_differ_are_counted_one_by_one() -> None:
    """Megatron writes the layers of such a model by their numbers: decoder.layers.N."""
    sizes: dict[str, Any] = {"num_layers": 4, "hidden_size": 8, "num_attention_heads": 2}

    def tensors(moe_layers: list[int]) -> dict[str, TensorInfo]:
        layers = {
            f"module.decoder.layers.{n}.self_attention.linear_qkv.weight": TensorInfo((24, 8), "float32")
            for n in range(4)
        }
        routers = {
            f"module.decoder.layers.{n}.mlp.router.weight": TensorInfo((4, 8), "float32") for n in moe_layers
        }
        return layers | routers

    for frequency, moe_layers in (([0, 1, 1, 1], [1, 2, 3]), (2, [0, 2]), ([1, 0, 1, 0], [0, 2])):
        config = SkyworkMoETinyConfig(**sizes, num_moe_experts=4, moe_layer_freq=frequency)
        check_sizes(tensors(moe_layers), config, Path("checkpoint"))
        with pytest.raises(ConfigurationError, match=r"moe_layer_freq is .*routers in \[0, 1\]"):
            check_sizes(tensors([0, 1]), config, Path("checkpoint"))
        with pytest.raises(ConfigurationError, match=r"num_moe_experts is 8, .* has 4"):
            check_sizes(
                tensors(moe_layers),
                SkyworkMoETinyConfig(**sizes, num_moe_experts=8, moe_layer_freq=frequency),
                Path("checkpoint"),
            )


def test_deepep_under_edp_is_refused_also_as_a_callback() -> None:
    checks.check_callbacks([DeepEPCallback()], SkyworkMoETinyConfig(moe_edp=False))
    with pytest.raises(ConfigurationError, match="DeepEPCallback sets moe_token_dispatcher_type='flex'"):
        checks.check_callbacks([DeepEPCallback()], SkyworkMoETinyConfig())


def adapted(peft: Any, expert_parallel: int = 1, **options: Any) -> None:
    config = SkyworkMoETinyConfig(
        **({"moe_adaptive_aux_loss": False, "moe_router_load_balancing_type": "none"} | options)
    )
    checks.check_adapters(peft, config, SimpleNamespace(expert_model_parallel_size=expert_parallel))


@every("target", ["router", "*.router", "*.layers.0.*", "*mlp*"])
def test_lora_on_the_router_is_refused(target: str) -> None:
    adapted(LoRA())
    with pytest.raises(ConfigurationError, match="which takes in the router"):
        adapted(LoRA(target_modules=["linear_qkv", target]))


@every("peft", [LoRA(), LoRA(target_modules=["*.linear_fc1"])], ids=["all", "fc1"])
def test_lora_on_experts_that_ranks_share_is_refused(peft: Any) -> None:
    adapted(peft)
    adapted(LoRA(target_modules=["linear_qkv", "linear_proj"]), expert_parallel=2)
    with pytest.raises(ConfigurationError, match="expert_model_parallel_size=2: NeMo averages"):
        adapted(peft, expert_parallel=2)


def test_lora_on_all_but_some_modules_is_refused_where_these_are_not_the_experts() -> None:
    def world() -> None:
        lora_without_te.apply()
        adapted(LoRA(target_modules=[], exclude_modules=["*experts*"]), expert_parallel=2)
        adapted(LoRA(target_modules=[], exclude_modules=["linear_qkv"]), expert_parallel=2)

    with pytest.raises(RankFailed, match=r"peft.target_modules is \[\] with expert_model_parallel_size=2"):
        run_ranks(world, 1)


def test_adaptive_coefficients_of_a_frozen_router_are_refused() -> None:
    with pytest.raises(
        ConfigurationError, match="moe_adaptive_aux_loss balances a router, which peft freezes"
    ):
        adapted(LoRA(), moe_adaptive_aux_loss=True, moe_router_load_balancing_type="aux_loss")


@every("trained", [True, False])
def test_a_start_that_the_runs_own_checkpoint_overrules_is_said(trained: bool, tmp_path: Path) -> None:
    if trained:
        (tmp_path / "run" / "checkpoints" / "step=4-last").mkdir(parents=True)
    warned: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checks.logging, "warning", warned.append)
        checks.warn_of_own_checkpoint(
            SimpleNamespace(restore_config=SimpleNamespace(path="upcycled"), resume_if_exists=True),
            SimpleNamespace(log_dir=str(tmp_path), name="run"),
        )
    assert [("upcycled" in line and str(tmp_path / "run") in line) for line in warned] == [True] * trained
