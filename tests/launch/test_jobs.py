"""Every group composed and resolved into recipes and executors; nothing of a recipe said twice."""

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import fiddle as fdl
import nemo_run as run
import pytest
import yaml
from nemo_run.core.serialization.zlib_json import ZlibJSONSerializer

from nemo_skymoe.architecture import SKYWORK_MOE_146B
from nemo_skymoe.commands.launch import jobs
from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.launch.composition import GROUPS, compose_groups
from nemo_skymoe.launch.jobs import Job, _plan_of
from nemo_skymoe.nemo.pipeline import written_plan
from nemo_skymoe.recipes.registry import FIXED, RECIPES
from tests.cases import every

CONF = Path(__file__).resolve().parents[2] / "conf"
OPTIONS = {group: sorted(file.stem for file in (CONF / group).glob("*.yaml")) for group in GROUPS}
SLURM = ["cluster=a800_slurm", "training.dir=/data/runs"]
PATHS = {
    "upcycle": ["upcycle.source=/data/dense", "upcycle.output_path=/data/upcycled"],
    "conversion": ["conversion.source=/data/a", "conversion.output_path=/data/b"],
}
SOURCES = "upcycle.further_sources={zh: /data/zh, en: /data/en, code: /data/code}"


def made(*overrides: str) -> list[Job]:
    return jobs(compose_groups(overrides))


def recipe_of(name: str, task: str = "pretrain") -> Any:
    (entry,) = [recipe for recipe in FIXED if recipe.name == name]
    module = importlib.import_module(f"nemo_skymoe.recipes.{entry.module}")
    return getattr(module, getattr(entry, task))


def test_every_recipe_has_its_file_and_every_file_its_recipe() -> None:
    assert OPTIONS["training"] == sorted(recipe.name for recipe in RECIPES)
    for name in OPTIONS["training"]:
        assert yaml.safe_load((CONF / "training" / f"{name}.yaml").read_text()) == {
            "recipe": name,
            "task": "pretrain",
        }


@every(name=[recipe.name for recipe in FIXED])
def test_every_training_is_its_recipe_and_nothing_else(name: str) -> None:
    large = [] if "tiny" in name else ["cluster=a800_slurm"]
    (job,) = made(f"training={name}", "training.dir=/data/runs", *large, "data.corpus=/data/corpus")
    expected = recipe_of(name)(dir="/data/runs", corpus="/data/corpus")
    assert job.task == expected
    assert ZlibJSONSerializer().deserialize(ZlibJSONSerializer().serialize(job.task)) == expected
    trainer, executor = expected.trainer, job.executor
    assert (executor.nodes, executor.ntasks_per_node) == (trainer.num_nodes, trainer.devices)


@every(name=OPTIONS["model"])
def test_every_model_fits_the_moe_recipes(name: str) -> None:
    (job,) = made("training=skywork_moe_146b", *SLURM, f"model={name}")
    config = fdl.build(job.task.model.config)
    changes = yaml.safe_load((CONF / "model" / f"{name}.yaml").read_text())
    assert all(getattr(config, option) == value for option, value in changes.items())
    plain = recipe_of("skywork_moe_146b")(dir="/data/runs")
    for option in changes:
        assert getattr(fdl.build(plain.model.config), option) != changes[option]


@every(name=OPTIONS["upcycle"], cluster=OPTIONS["cluster"])
def test_every_upcycling_is_its_command(name: str, cluster: str) -> None:
    more = [SOURCES] if name == "specialized" else []
    (job,) = made("jobs=[upcycle]", f"cluster={cluster}", f"upcycle={name}", *PATHS["upcycle"], *more)
    given = fdl.ordered_arguments(job.task)
    assert job.task.__fn_or_cls__.__name__ == "upcycle"
    assert (given["init"], given["source"], given["output_path"]) == (name, "/data/dense", "/data/upcycled")
    assert job.executor.ntasks_per_node == 1 and job.executor.launcher is None
    assert "CUDA_DEVICE_MAX_CONNECTIONS" not in job.executor.env_vars


@every(name=OPTIONS["conversion"])
def test_every_conversion_is_its_command(name: str) -> None:
    (job,) = made("jobs=[conversion]", f"conversion={name}", *PATHS["conversion"])
    assert job.task.__fn_or_cls__.__name__ == "convert" and job.task.to == name.removeprefix("to_")


def test_finetuning_and_its_data() -> None:
    (job,) = made(
        "training=skywork_moe_146b",
        "training.task=finetune",
        *SLURM,
        "data=finetuning",
        "data.dataset=/data/d",
    )
    assert job.task == recipe_of("skywork_moe_146b", "finetune")(dir="/data/runs", dataset="/data/d")


def test_jobs_hand_their_checkpoints_on() -> None:
    convert, upcycle, train = made(
        "jobs=[conversion,upcycle,training]",
        "training=skywork_moe_146b",
        *SLURM,
        *PATHS["conversion"],
        "upcycle.output_path=/data/up",
    )
    assert upcycle.task.source == convert.task.output_path == "/data/b"
    assert train.task.resume.restore_config.path == "/data/up"
    *_, train = made(
        "jobs=[upcycle,training]",
        "training=skywork_moe_146b",
        *SLURM,
        *PATHS["upcycle"],
        "training.resume_path=/data/x",
    )
    assert train.task.resume.restore_config.path == "/data/x"


@every(name=OPTIONS["plan"])
def test_every_plan_is_that_of_the_training(name: str) -> None:
    plan, train = made(
        "jobs=[plan,training]",
        "training=skywork_moe_146b",
        *SLURM,
        f"plan={name}",
        "plan.output_path=/data/p",
    )
    options = fdl.ordered_arguments(plan.task)
    assert plan.task.__fn_or_cls__.__name__ == "plan" and options["output_path"] == "/data/p"
    model = fdl.build(options["model"])
    assert model == replace(SKYWORK_MOE_146B, num_query_groups=36, kv_channels=128)
    assert "model=num_layers=52,hidden_size=4608" in plan.summary and "num_moe_experts=16" in plan.summary
    assert (options["num_gpus"], options["capacity_factor"]) == (1536, 1.25)
    # The recipe's own is the planner's: found again, from its sizes alone.
    recipe = recipe_of("skywork_moe_146b")(dir="/data/runs")
    found = _plan_of(plan.task)
    assert found is not None
    assert (found.layout, found.recompute) == (recipe.pipeline.layout, recipe.pipeline.recompute)
    assert train.task.pipeline == run.Config(written_plan, file="/data/p")


def test_a_plan_that_is_not_written_yet_is_checked() -> None:
    given = ["jobs=[plan,training]", "training=skywork_moe_146b", *SLURM, "plan.output_path=/data/p"]
    with pytest.raises(ConfigurationError, match=r"needs \d+.\d\d GB more on stage"):
        made(*given, "plan.memory_limit=20")
    with pytest.raises(ConfigurationError, match=r"training.pipeline_layout is 'Et' and jobs has plan"):
        made(*given, "training.pipeline_layout=Et")
    with pytest.raises(ConfigurationError, match=r"training.pipeline_recompute is .* and jobs has plan"):
        made(*given, "training.pipeline_recompute=[[1],[0]]")
    with pytest.raises(ConfigurationError, match="virtual stages by stage, the layout"):
        made(*given, "plan.pipeline_parallel=24", "plan.num_gpus=3072")
    with pytest.raises(ConfigurationError, match=r"plan.output_path is /scratch/p, expected a path below"):
        made(*given[:-1], "plan.output_path=/scratch/p")


@every(name=OPTIONS["export"])
def test_every_export_is_of_the_runs_last_checkpoint(name: str) -> None:
    *_, export = made(
        "jobs=[training,export]",
        "training=skywork_moe_146b",
        *SLURM,
        "training.name=mine",
        f"export={name}",
        "export.output_path=/data/hf",
    )
    options = fdl.ordered_arguments(export.task)
    assert export.task.__fn_or_cls__.__name__ == "convert" and options["to"] == "hf"
    assert (options["source"], options["output_path"]) == ("/data/runs/mine", "/data/hf")
    (alone,) = made("jobs=[export]", "export.source=/data/runs/x", "export.output_path=/data/hf")
    assert alone.task.source == "/data/runs/x"


def test_arguments_and_parts_of_a_recipe() -> None:
    (job,) = made(
        "training=skywork_moe_146b",
        *SLURM,
        "training.num_nodes=24",
        "training.pipeline_parallelism=12",
        "training.trainer.strategy.ckpt_async_save=false",
        "training.optim.config.clip_grad=0.5",
        "data.seq_length=4096",
        "model.moe_router_logit_norm_scale=0.5",
        "cluster.retries=3",
        "cluster.saving_seconds=300",
    )
    recipe = job.task
    assert recipe.trainer.num_nodes == job.executor.nodes == 24
    assert not recipe.trainer.strategy.ckpt_async_save and recipe.optim.config.clip_grad == 0.5
    assert recipe.data.seq_length == recipe.model.config.seq_length == 4096
    assert recipe.model.config.moe_router_logit_norm_scale == 0.5
    preemption: Any = job.plugins[0]
    assert job.executor.retries == 3 and preemption.preempt_time == 300


def test_the_toy_scale_runs_here() -> None:
    (job,) = made("training=skywork_moe_146b", "training.scale=toy")
    assert isinstance(job.executor, run.LocalExecutor) and job.executor.ntasks_per_node == 2
    assert job.executor.env_vars["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"


@every(
    refused=[
        (["training.max_lrr=1"], "option training.max_lrr is unknown: did you mean training.max_lr"),
        (["training.max_step=3"], "option training.max_step is unknown: did you mean training.trainer.max_steps"),
        (["training.stages=a.yaml"], "training.stages is now called phases, expected training.phases=VALUE"),
        (["training.lr=1"], "option training.lr is unknown: did you mean training.optim.config.lr"),
        (["training.trainer.max_lr=1"], "option training.trainer.max_lr is unknown: did you mean training.max_lr"),
        (["training.strategy.ckpt_async_save=1"], "option training.strategy is unknown: did you mean training.trainer.strategy"),
        (["training.log.extra_logger=1"], "training.log.extra_logger is unknown: did you mean training.log.extra_loggers"),
        (["cluster.env_var={A: b}"], "cluster.env_var is unknown: did you mean cluster.env_vars"),
        (["training.trainer.max_stepz=1"], "training.trainer.max_stepz is unknown: did you mean training.trainer.max_steps"),
        (["model.moe_router_topkk=1"], "model.moe_router_topkk is unknown: did you mean model.moe_router_topk"),
        (["data.corpuss=/data/x"], "option data.corpuss is unknown: "),
        (["cluster.acount=x"], "cluster.acount is unknown: did you mean cluster.account"),
        (["cluster.executor=slurm"], "cluster.executor slurm is unknown: did you mean a800_slurm"),
        (["training.recipe=skywork_mo_146b"], "training.recipe skywork_mo_146b is unknown: did you mean skywork_moe_146b"),
        (["training.task=distill"], "training.task is 'distill', expected pretrain, or finetune for one of skywork_13b"),
        (["training=skywork_300m", "training.task=finetune"], "training.task is 'finetune', expected pretrain"),
        (["training.num_nodes=many"], "training.num_nodes is 'many', expected int"),
        (["training.trainer.max_steps=[1]"], r"training.trainer.max_steps is \[1\], expected"),
        (["training.num_nodes=5"], "is 40 ranks, expected a multiple of tensor_model_parallel_size=4"),
        (["training.edp=3", "training.num_nodes=9"], "3"),
        (["training.pipeline_parallelism=6"], "layout"),
        (["model.moe_router_logit_norm_scale=-1"], "moe_router_logit_norm_scale"),
        (["model.seq_length=4096"], "data.seq_length is 8192 and model.seq_length 4096, expected the same"),
        (["data=corpus"], "data.corpus is missing, expected data.corpus=VALUE"),
        (["data.max_lr=1", "training.max_lr=2"], "max_lr is given as training.max_lr and as data.max_lr"),
        (["jobs=[upcycle]"], "upcycle.source is missing, expected upcycle.source=VALUE"),
        (["jobs=[upcycle]", "upcycle.sources=[a]"], "upcycle.source is missing"),
        (["jobs=[upcycle]", *PATHS["upcycle"], "upcycle.num_expert=8"], "did you mean upcycle.num_experts"),
        (["cluster.nodes=3"], "cluster.nodes is given, expected training.num_nodes"),
        (["cluster=local"], "training.num_nodes is 192, expected 1 on cluster.executor=local_torchrun"),
        (["cluster.fault_tolerance=true"], "fault_tolerance needs nvidia-resiliency-ext"),
        (["training.dir=runs"], "training.dir is runs, expected an absolute path"),
        (["training.dir=/scratch/runs"], "training.dir is /scratch/runs, expected a path below one of .*: /data"),
        (["training.resume_path=/up"], "training.resume_path is /up, expected a path below one of"),
        (["data.corpus=corpus"], "training.corpus is corpus, expected an absolute path"),
        (["upcycle.source=${nowhere}"], "nowhere"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_by_name(refused: tuple[list[str], str]) -> None:
    overrides, message = refused
    defaults = ["training=skywork_moe_146b", *SLURM]
    heads = [override.partition("=")[0] for override in overrides]
    with pytest.raises(ConfigurationError, match=message) as raised:
        made(*(default for default in defaults if default.partition("=")[0] not in heads), *overrides)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("yaml_text", "message"),
    [
        ("init: copy\nsource: /a", "upcycle.output_path is missing, expected upcycle.output_path=VALUE"),
        ("init: [copy", "ours.yaml"),
        ("init: copy\nsource: ${absent}\noutput_path: /b", "absent"),
        ("init: copy\nsource: /a\noutput_path: /b\nnum_expert: 4", "did you mean upcycle.num_experts"),
    ],
)
def test_a_sites_files_are_checked_as_well(yaml_text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "upcycle").mkdir()
    (tmp_path / "upcycle" / "ours.yaml").write_text(yaml_text)
    with pytest.raises(ConfigurationError, match=message) as refused:
        jobs(compose_groups(["jobs=[upcycle]", "upcycle=ours"], tmp_path))
    assert "\n" not in str(refused.value)


def test_no_value_of_a_recipe_is_repeated_in_yaml() -> None:
    import inspect

    arguments = {
        name
        for recipe in FIXED
        for task in ("pretrain", "finetune")
        if getattr(recipe, task)
        for name in inspect.signature(recipe_of(recipe.name, task)).parameters
    }
    for group in ("training", "data", "cluster"):
        for option in OPTIONS[group]:
            values = yaml.safe_load((CONF / group / f"{option}.yaml").read_text()) or {}
            assert {key for key in arguments & values.keys() if values[key] != "???"} == set()
