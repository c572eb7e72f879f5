"""The factories as NeMo-Run and NeMo see them, before anything is trained."""

from pathlib import Path
from typing import Any

import fiddle as fdl
import nemo_run as run
import pytest
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from nemo.collections.llm import api
from nemo.collections.llm.recipes.precision.mixed_precision import bf16_mixed
from nemo.lightning.run.plugins import ConfigValidationPlugin
from nemo_run.core.serialization.zlib_json import ZlibJSONSerializer

from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.nemo.model import SkyworkMoEModel
from nemo_skymoe.pipeline import plan
from nemo_skymoe.recipes import _common
from tests.recipes.factories import FACTORIES, VARIANTS, label, leaves

variants = pytest.mark.parametrize("variant", VARIANTS, ids=label)
# What `scale=` may change, beside what only says so again.
SIZES = {
    "width and depth": {
        "model.config.num_layers",
        "model.config.hidden_size",
        "model.config.ffn_hidden_size",
        "model.config.num_attention_heads",
    },
    "sequence": {"model.config.seq_length", "data.seq_length"},
    "batch": {"data.global_batch_size", "data.micro_batch_size"},
    "vocabulary: the demonstration corpus, with its tokenizer": {
        "data()",
        "data.corpus",
        "data.seed",
        "data.tokenizer()",
        "data.tokenizer.vocab_size",
        "tokenizer",
    },
    "steps": {
        "trainer.max_steps",
        "trainer.val_check_interval",
        "trainer.limit_val_batches",
        "trainer.log_every_n_steps",
        "log.ckpt.every_n_train_steps",
        "optim.lr_scheduler.max_steps",
        "optim.lr_scheduler.warmup_steps",
        "optim.lr_scheduler.decay_steps",
    },
    "devices": {
        "trainer.num_nodes",
        "trainer.devices",
        "trainer.strategy.tensor_model_parallel_size",
        "trainer.strategy.expert_model_parallel_size",
        "trainer.strategy.pipeline_model_parallel_size",
    },
    "devices: no plan for another pipeline": {"pipeline", "pipeline()", "pipeline.layout"},
    "a finetuning's checkpoint, of which there is none of this size": {
        "resume.restore_config",
        "resume.restore_config()",
        "resume.restore_config.path",
    },
}
ALLOWED = set().union(*SIZES.values())
FLOAT32 = {
    "trainer.strategy.sequence_parallel",
    "trainer.strategy.pipeline_dtype",
    "trainer.plugins()",
    *(f"trainer.plugins.{name}" for name in fdl.ordered_arguments(bf16_mixed()) | {"autocast_enabled": None}),
}


def made(variant: tuple[str, dict[str, Any]], **more: Any) -> Any:
    command, arguments = variant
    return FACTORIES[command](**arguments, **more)


@variants
@pytest.mark.parametrize("scale", [None, "toy", "miniature"])
def test_recipes_survive_serialisation(variant: Any, scale: str | None) -> None:
    recipe, serializer = made(variant, scale=scale), ZlibJSONSerializer()
    assert serializer.deserialize(serializer.serialize(recipe)) == recipe


@variants
@pytest.mark.parametrize("scale", ["toy", "miniature"])
def test_a_scale_differs_in_nothing_but_size(variant: Any, scale: str) -> None:
    full, small = dict(leaves(made(variant))), dict(leaves(made(variant, scale=scale)))
    differences = {path for path in full.keys() | small.keys() if full.get(path) != small.get(path)}
    different = {path for path in differences if not path.startswith("pipeline.recompute")}
    assert different - ALLOWED - (FLOAT32 if scale == "miniature" else set()) == set()
    assert SIZES["width and depth"] | {"trainer.max_steps", "model.config.seq_length"} <= different


def test_a_miniature_keeps_the_shares_of_tokens_and_schedule() -> None:
    full = FACTORIES["pretrain skywork_moe_1p8b"]()
    small = FACTORIES["pretrain skywork_moe_1p8b"](scale="miniature")
    tokens = [
        made.trainer.max_steps * made.data.seq_length * made.data.global_batch_size for made in (full, small)
    ]
    assert tokens[1] / tokens[0] == pytest.approx(1e-5, rel=1e-3)
    schedules = [made.optim.lr_scheduler for made in (full, small)]
    for part in ("warmup_steps", "decay_steps"):
        shares = [getattr(schedule, part) / schedule.max_steps for schedule in schedules]
        assert shares[1] == pytest.approx(shares[0], abs=1 / small.trainer.max_steps)
    assert small.optim.config.lr == full.optim.config.lr


@variants
def test_nemos_validation_passes(variant: Any, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    recipe = made(variant)
    built = {part: fdl.build(getattr(recipe, part)) for part in ("model", "data", "trainer")}
    api._validate_config(**built)
    ConfigValidationPlugin().setup(recipe, run.LocalExecutor())


@variants
def test_sequences_are_as_long_in_the_data_as_in_the_model(variant: Any) -> None:
    recipe = made(variant, seq_length=512)
    assert recipe.data.seq_length == recipe.model.config.seq_length == 512


@variants
def test_edp_is_expert_parallelism_in_the_tensor_parallel_group(variant: Any) -> None:
    strategy = made(variant).trainer.strategy
    assert strategy.expert_model_parallel_size == strategy.tensor_model_parallel_size
    assert strategy.expert_tensor_parallel_size == 1
    assert strategy.sequence_parallel == (strategy.tensor_model_parallel_size > 1)


def test_the_146b_is_laid_out_as_in_the_report() -> None:
    recipe = FACTORIES["pretrain skywork_moe_146b"]()
    strategy, trainer = recipe.trainer.strategy, recipe.trainer
    model_parallel = strategy.tensor_model_parallel_size * strategy.pipeline_model_parallel_size
    assert (strategy.tensor_model_parallel_size, strategy.pipeline_model_parallel_size) == (4, 12)
    assert trainer.num_nodes * trainer.devices == 1536 == 32 * model_parallel
    assert strategy.ddp.use_distributed_optimizer and recipe.optim.config.use_distributed_optimizer
    assert trainer.plugins.precision == "bf16-mixed" and recipe.model.config.seq_length == 8192
    assert len(PipelineParallelLayerLayout.parse_str_to_list(recipe.pipeline.layout)) == 12
    assert recipe.model.config.rotary_base == 10000


def test_the_146b_has_the_planners_layout() -> None:
    recipe = FACTORIES["pretrain skywork_moe_146b"]()
    strategy, config = recipe.trainer.strategy, recipe.model.config
    found = plan(
        "skywork-moe-146b",
        "A800-80G",
        num_gpus=recipe.trainer.num_nodes * recipe.trainer.devices,
        tensor_parallel=strategy.tensor_model_parallel_size,
        expert_parallel=strategy.expert_model_parallel_size,
        pipeline_parallel=strategy.pipeline_model_parallel_size,
        seq_length=config.seq_length,
        global_batch_size=recipe.data.global_batch_size,
        micro_batch_size=recipe.data.micro_batch_size,
        capacity_factor=config.moe_expert_capacity_factor,
    )
    assert (recipe.pipeline.layout, recipe.pipeline.recompute) == (found.layout, found.recompute)


@pytest.mark.parametrize(
    ("arguments", "end"),
    [
        ({"start": "scratch"}, 3e-3),
        ({"start": "100b", "resume_path": "upcycled"}, 1.8e-3),
        ({"start": "300b", "resume_path": "upcycled"}, 3e-4),
        ({"start": "300b_high_lr", "resume_path": "upcycled"}, 1.2e-3),
    ],
)
@pytest.mark.parametrize(("budget", "tokens"), [("100b", 100e9), ("300b", 300e9)])
def test_figure_1(arguments: dict[str, str], end: float, budget: str, tokens: float) -> None:
    recipe = FACTORIES["pretrain skywork_moe_300m_x8"](budget=budget, **arguments)
    rate = rates(recipe)
    assert (
        rate(recipe.optim.lr_scheduler.warmup_steps + 1),
        rate(recipe.trainer.max_steps),
    ) == pytest.approx((end, 3e-4), rel=1e-4)
    seen = recipe.trainer.max_steps * recipe.data.seq_length * recipe.data.global_batch_size
    assert 0 <= seen - tokens < recipe.data.seq_length * recipe.data.global_batch_size


@pytest.mark.parametrize(("setting", "peak", "multiplier"), [("baseline", 6e-3, 1), ("expert", 6e-3, 0.25), ("all", 1.5e-3, 1)])  # fmt: skip
def test_figure_7(setting: str, peak: float, multiplier: float) -> None:
    recipe = FACTORIES["pretrain skywork_moe_1p8b"](learning_rates=setting)
    rate, batch = rates(recipe), recipe.data.seq_length * recipe.data.global_batch_size
    after_300b, after_310b = _common.steps(300e9, batch, 1), recipe.trainer.max_steps
    assert after_310b - after_300b == _common.steps(10e9, batch, 1)
    assert rate(after_300b) == pytest.approx(peak / 10)
    assert rate(after_310b) == 0 and recipe.optim.config.lr == peak
    assert fdl.ordered_arguments(recipe.optim).get("lr_mult", 1) == multiplier


@pytest.mark.parametrize(("normalisation", "scale"), [("off", None), ("0.5", 0.5), ("1", 1.0), ("2", 2.0)])
def test_figure_3(normalisation: str, scale: float | None) -> None:
    recipe = FACTORIES["pretrain skywork_moe_2p5b"](normalisation=normalisation)
    config = fdl.build(recipe.model.config)
    assert config.moe_router_logit_norm_scale == scale and config.num_moe_experts == 16


def rates(recipe: Any) -> Any:
    schedule = fdl.build(recipe.optim.lr_scheduler)
    return lambda step: recipe.optim.config.lr * schedule.factor(step)


def test_fusions_are_left_to_the_machine_or_switched_by_name() -> None:
    factory = FACTORIES["pretrain skywork_moe_146b"]
    names = ("moe_grouped_gemm", "moe_permute_fusion", "apply_rope_fusion", "gradient_accumulation_fusion")
    arguments = ("grouped_gemm", "permute_fusion", "rope_fusion", "gradient_accumulation_fusion")
    assert not {*names, "transformer_layer_spec"} & {*fdl.ordered_arguments(factory().model.config)}
    for value in (True, False):
        config = factory(**dict.fromkeys(arguments, value)).model.config
        assert [getattr(config, name) for name in names] == [value] * 4
    plain = factory(transformer_engine=False).model.config
    assert plain.transformer_layer_spec.__name__ == "skywork_local_layer_spec"
    assert plain.moe_grouped_gemm is False
    reduced = factory(grad_reduce_in_fp32=False).trainer
    assert not reduced.plugins.grad_reduce_in_fp32 and not reduced.strategy.ddp.grad_reduce_in_fp32
    overlap = [type_of(one) for one in factory().trainer.callbacks]
    assert "MegatronCommOverlapCallback" in overlap
    without = [type_of(one) for one in factory(communication_overlap=False).trainer.callbacks]
    assert set(overlap) - set(without) == {"MegatronCommOverlapCallback"}
    assert factory(tensor_parallel_overlap=True).trainer.callbacks[-1].tp_comm_overlap


def type_of(config: Any) -> str:
    return config.__fn_or_cls__.__name__


@pytest.mark.parametrize("name", ["skywork_13b", "skywork_moe_146b", "skywork_tiny", "skywork_moe_tiny"])
def test_lora_takes_attention_and_experts_and_leaves_the_router(name: str) -> None:
    recipe = FACTORIES[f"finetune {name}"]()
    assert recipe.peft.target_modules == ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]
    if recipe.model.__fn_or_cls__ is SkyworkMoEModel:
        config = fdl.build(recipe.model.config)
        assert not config.moe_adaptive_aux_loss and config.moe_expert_capacity_factor is None
    assert "peft" not in fdl.ordered_arguments(FACTORIES[f"finetune {name}"](peft_scheme="none"))


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("pretrain skywork_13b", {"scale": "small"}, "scale is 'small', expected toy or miniature"),
        ("pretrain skywork_moe_300m_x8", {"start": "200b"}, "start is '200b', expected one of scratch, 100b"),
        ("pretrain skywork_moe_300m_x8", {"budget": "1b"}, "budget is '1b', expected one of 100b, 300b"),
        ("pretrain skywork_moe_300m_x8", {"start": "100b"}, "expected skywork_300m after 100B tokens, upcycled"),
        ("pretrain skywork_moe_300m_x8", {"resume_path": "x"}, "resume_path is x with start=scratch, expected none"),
        ("pretrain skywork_moe_2p5b", {"normalisation": "3"}, "normalisation is '3', expected one of off, 0.5, 1, 2"),
        ("pretrain skywork_moe_1p8b", {"learning_rates": "x"}, "learning_rates is 'x', expected one of baseline"),
        ("pretrain skywork_1p3b", {"train_only_ffn": True}, "resume_path is None with train_only_ffn"),
        ("pretrain skywork_moe_1p3b_x8", {"sources": 3}, "sources is 3, expected 1 or 4"),
        ("finetune skywork_13b", {"peft_scheme": "dora"}, "peft_scheme is 'dora', expected lora or none"),
    ],
)  # fmt: skip
def test_arguments_out_of_range_are_named(command: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        FACTORIES[command](**arguments)
