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
from nemo_skymoe.experiments import demonstration, dense_13b, figure_1, figure_3, figure_7, figure_8, moe_146b
from nemo_skymoe.experiments.runs import steps
from nemo_skymoe.nemo.model import SkyworkMoEModel
from nemo_skymoe.pipeline import plan
from tests.cases import every
from tests.recipes.factories import FACTORIES, VARIANTS, leaves

every_variant = every(variant=VARIANTS)
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


@every(variant=VARIANTS, scale=[None, "toy", "miniature"])
def test_recipes_survive_serialisation(variant: Any, scale: str | None) -> None:
    recipe, serializer = made(variant, scale=scale), ZlibJSONSerializer()
    assert serializer.deserialize(serializer.serialize(recipe)) == recipe


@every(variant=VARIANTS, scale=["toy", "miniature"])
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


@every_variant
def test_nemos_validation_passes(variant: Any, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    recipe = made(variant)
    built = {part: fdl.build(getattr(recipe, part)) for part in ("model", "data", "trainer")}
    api._validate_config(**built)
    ConfigValidationPlugin().setup(recipe, run.LocalExecutor())


@every_variant
def test_sequences_are_as_long_in_the_data_as_in_the_model(variant: Any) -> None:
    recipe = made(variant, seq_length=512)
    assert recipe.data.seq_length == recipe.model.config.seq_length == 512


@every_variant
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


@every(
    start=[
        ({"start": "scratch"}, 3e-3),
        ({"start": "100b", "resume_path": "upcycled"}, 1.8e-3),
        ({"start": "300b", "resume_path": "upcycled"}, 3e-4),
        ({"start": "300b_high_lr", "resume_path": "upcycled"}, 1.2e-3),
    ],
    length=[("100b", 100e9), ("300b", 300e9)],
)
def test_figure_1(start: tuple[dict[str, str], float], length: tuple[str, float]) -> None:
    (arguments, end), (budget, tokens) = start, length
    recipe = FACTORIES["pretrain skywork_moe_300m_x8"](budget=budget, **arguments)
    rate = rates(recipe)
    assert (
        rate(recipe.optim.lr_scheduler.warmup_steps + 1),
        rate(recipe.trainer.max_steps),
    ) == pytest.approx((end, 3e-4), rel=1e-4)
    seen = recipe.trainer.max_steps * recipe.data.seq_length * recipe.data.global_batch_size
    assert 0 <= seen - tokens < recipe.data.seq_length * recipe.data.global_batch_size


@every(expected=[("baseline", 6e-3, 1), ("expert", 6e-3, 0.25), ("all", 1.5e-3, 1)])
def test_figure_7(expected: tuple[str, float, float]) -> None:
    setting, peak, multiplier = expected
    recipe = FACTORIES["pretrain skywork_moe_1p8b"](learning_rates=setting)
    rate, batch = rates(recipe), recipe.data.seq_length * recipe.data.global_batch_size
    after_300b, after_310b = steps(300e9, batch, 1), recipe.trainer.max_steps
    assert after_310b - after_300b == steps(10e9, batch, 1)
    assert rate(after_300b) == pytest.approx(peak / 10)
    assert rate(after_310b) == 0 and recipe.optim.config.lr == peak
    assert fdl.ordered_arguments(recipe.optim).get("lr_mult", 1) == multiplier


@every(expected=[("off", None), ("0.5", 0.5), ("1", 1.0), ("2", 2.0)])
def test_figure_3(expected: tuple[str, float | None]) -> None:
    normalisation, scale = expected
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


@every(name=["skywork_13b", "skywork_moe_146b", "skywork_tiny", "skywork_moe_tiny"])
def test_lora_takes_attention_and_experts_and_leaves_the_router(name: str) -> None:
    recipe = FACTORIES[f"finetune {name}"]()
    assert recipe.peft.target_modules == ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]
    if recipe.model.__fn_or_cls__ is SkyworkMoEModel:
        config = fdl.build(recipe.model.config)
        assert not config.moe_adaptive_aux_loss and config.moe_expert_capacity_factor is None
    assert "peft" not in fdl.ordered_arguments(FACTORIES[f"finetune {name}"](peft_scheme="none"))


@every(
    refused=[
        ("pretrain skywork_13b", {"stages": "x"}, "stages is now called phases, expected phases=VALUE"),
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
def test_arguments_out_of_range_are_named(refused: tuple[str, dict[str, Any], str]) -> None:
    command, arguments, message = refused
    with pytest.raises(ConfigurationError, match=message):
        FACTORIES[command](**arguments)


EXPERIMENTS = {
    "pretrain skywork_13b": dense_13b.PRETRAINING,
    "finetune skywork_13b": dense_13b.FINETUNING,
    "pretrain skywork_moe_146b": moe_146b.PRETRAINING,
    "finetune skywork_moe_146b": moe_146b.LORA,
    "pretrain skywork_300m": figure_1.DENSE,
    "pretrain skywork_moe_300m_x8": figure_1.moe("scratch", "100b"),
    "pretrain skywork_moe_2p5b": figure_3.MOE,
    "pretrain skywork_moe_1p8b": figure_7.MOE,
    "pretrain skywork_1p3b": figure_8.DENSE,
    "pretrain skywork_moe_1p3b_x8": figure_8.MOE,
    "pretrain skywork_tiny": demonstration.DENSE,
    "finetune skywork_tiny": demonstration.finetuning_of(demonstration.DENSE),
    "pretrain skywork_moe_tiny": demonstration.MOE,
    "finetune skywork_moe_tiny": demonstration.finetuning_of(demonstration.MOE),
}


@every(command=FACTORIES)
def test_a_recipe_has_the_sizes_of_its_experiment(command: str) -> None:
    recipe, expected = FACTORIES[command](), EXPERIMENTS[command]
    config, sizes = fdl.build(recipe.model.config), expected.architecture
    names = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_moe_experts")
    assert [getattr(config, name) for name in names] == [getattr(sizes, name) for name in names]
    assert sizes.num_moe_experts is None or config.moe_router_topk == sizes.moe_router_topk
    assert (config.rotary_base, config.seq_length) == (expected.rotary_base, expected.seq_length)
    trainer, strategy = recipe.trainer, recipe.trainer.strategy
    assert trainer.max_steps == expected.max_steps
    assert (trainer.num_nodes, trainer.devices) == (expected.num_nodes, expected.num_gpus_per_node)
    assert strategy.tensor_model_parallel_size == expected.edp
    assert fdl.build(strategy).pipeline_model_parallel_size == expected.pipeline_parallelism
    assert recipe.data.global_batch_size == expected.global_batch_size
    assert recipe.data.micro_batch_size == expected.micro_batch_size
