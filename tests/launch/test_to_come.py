"""One launch upcycles a model and trains it: the recipe is the one that the written checkpoint would give."""

from pathlib import Path
from typing import Any

import pytest

from nemo_skymoe.checkpoint import convert
from nemo_skymoe.checkpoint.convert import TargetOptions
from nemo_skymoe.checkpoint.sources import open_source
from nemo_skymoe.checkpoint.upcycling.options import BASE, Upcycling
from nemo_skymoe.commands.launch import jobs
from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.launch.composition import compose_groups
from nemo_skymoe.launch.jobs import Job
from nemo_skymoe.recipes import skywork_dense, skywork_moe
from tests.cases import every
from tests.checkpoint.families import saved

LAYOUT = [
    "training.num_gpus_per_node=2",
    "training.precision='32'",
    "training.edp=2",
    "training.dir=/data/runs",
]
SIZES: dict[str, Any] = {"num_gpus_per_node": 2, "precision": "32", "edp": 2, "dir": "/data/runs"}


def made(*overrides: str) -> list[Job]:
    return jobs(compose_groups(overrides))


def upcycling(folder: Path, *options: str) -> list[str]:
    return [f"upcycle.source={folder}/hf", f"upcycle.output_path={folder}/upcycled", *options]


@every(
    "name, options, upcycled",
    [
        ("llama31", ["upcycle.num_experts=8"], Upcycling(num_experts=8)),
        ("qwen25", [], Upcycling()),
        ("qwen3", ["upcycle.init=granular", "upcycle.granularity=2", "upcycle.num_experts=4"], Upcycling(num_experts=4, init="granular", granularity=2)),
        ("llama32", ["upcycle.vocab_size=640", "upcycle.init=drop", "upcycle.drop_ratio=0.5"], Upcycling(init="drop", drop_ratio=0.5)),
    ],
    ids=str,
)  # fmt: skip
def test_the_recipe_is_that_of_the_checkpoint(
    name: str, options: list[str], upcycled: Upcycling, tmp_path: Path
) -> None:
    """Made before anything is written, and from what was written: equal in every value."""
    saved(name, tmp_path / "hf", num_key_value_heads=2)
    both = ["jobs=[upcycle,training]", "training=skywork_moe", *LAYOUT, *upcycling(tmp_path, *options)]
    before = made(*both)[-1].task
    rows = 640 if "upcycle.vocab_size=640" in options else None
    source = {BASE: open_source(tmp_path / "hf")}
    convert.plan(source, TargetOptions("nemo", vocab_size=rows), upcycled).run(tmp_path / "upcycled")
    assert before == skywork_moe.pretrain_recipe(resume_path=str(tmp_path / "upcycled"), **SIZES)
    assert made(*both)[-1].task == before  # launched again, where it is there


def test_a_conversion_hands_its_model_on(tmp_path: Path) -> None:
    saved("qwen25", tmp_path / "hf")
    saved("mixtral", tmp_path / "moe")
    source, written = f"conversion.source={tmp_path}/hf", f"conversion.output_path={tmp_path}/nemo"
    before = made("jobs=[conversion,training]", "training=skywork_dense", *LAYOUT, source, written)[-1].task
    *_, both = made(
        "jobs=[conversion,upcycle,training]", "training=skywork_moe", *LAYOUT, source, written,
        f"upcycle.output_path={tmp_path}/upcycled",
    )  # fmt: skip
    assert both.task.model.config.num_moe_experts == 16 and both.task.model.config.add_qkv_bias
    convert.plan({BASE: open_source(tmp_path / "hf")}, TargetOptions("nemo")).run(tmp_path / "nemo")
    assert before == skywork_dense.pretrain_recipe(resume_path=str(tmp_path / "nemo"), **SIZES)
    *_, moe = made(
        "jobs=[conversion,training]", "training=skywork_moe", *LAYOUT, f"conversion.source={tmp_path}/moe",
        f"conversion.output_path={tmp_path}/nemo-moe",
    )  # fmt: skip
    assert moe.task.model.config.moe_router_logit_norm_scale is None


def test_the_plan_and_the_export_know_the_model_too(tmp_path: Path) -> None:
    saved("llama31", tmp_path / "hf")
    stages = ["training.pipeline_parallelism=2", "training.edp=1", f"plan.output_path={tmp_path}/plan.json"]
    _, plan, training, export = made(
        "jobs=[upcycle,plan,training,export]", "training=skywork_moe", *LAYOUT, *stages, *upcycling(tmp_path),
        f"export.output_path={tmp_path}/exported",
    )  # fmt: skip
    assert plan.task.model.num_query_groups == 2 and plan.task.model.num_moe_experts == 16
    assert training.task.pipeline.file == f"{tmp_path}/plan.json"
    assert export.task.source == "/data/runs/skywork_moe"
    auto = made(
        "jobs=[upcycle,training]", "training=skywork_moe", *LAYOUT, *stages[:2], "training.plan=auto",
        *upcycling(tmp_path),
    )[-1]  # fmt: skip
    assert auto.task.pipeline.layout.startswith("E")


def test_through_bridge(tmp_path: Path) -> None:
    saved("qwen25", tmp_path / "hf")
    upcycle, training = made(
        "frontdoor=bridge", "frontdoor.python=/venv/bin/python", "jobs=[upcycle,training]", "training=skywork_moe",
        *LAYOUT, *upcycling(tmp_path),
    )  # fmt: skip
    assert upcycle.task.to == "bridge" and f"resume_path={tmp_path}/upcycled" in training.task.args
    assert "2 ranks, PP 1 x TP 2 x DP 1, EP 2" in training.summary
    dense = made(
        "frontdoor=bridge", "frontdoor.python=/venv/bin/python", "jobs=[conversion,training]", "conversion=to_bridge",
        "training=skywork_dense", *LAYOUT, f"conversion.source={tmp_path}/hf", f"conversion.output_path={tmp_path}/b",
    )[-1]  # fmt: skip
    assert "TP 2 x DP 1, EP 1" in dense.summary


def test_on_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SKYMOE_SLURM_MOUNTS", f"{tmp_path}:{tmp_path}")
    saved("llama31", tmp_path / "hf")
    _, training = made(
        "cluster=a800_slurm", "jobs=[upcycle,training]", "training=skywork_moe", *upcycling(tmp_path),
        f"training.dir={tmp_path}/runs", "training.num_nodes=4", "training.edp=2",
    )  # fmt: skip
    assert training.executor.nodes == 4 and training.task.model.config.rope_scaling_factor == 8.0


def test_what_cannot_be_known_is_refused_in_one_sentence(tmp_path: Path) -> None:
    saved("mixtral", tmp_path / "hf")
    given = ["jobs=[upcycle,training]", "training=skywork_moe", *LAYOUT]
    for overrides, message in (
        ([*given, *upcycling(tmp_path / "nowhere")], r"upcycle.source is .*nowhere/hf', expected a folder on this machine, because the recipe skywork_moe"),
        ([*given, *upcycling(tmp_path)], "upcycle.source is .*hf', which is an MoE, expected a dense model"),
        (given[1:], "resume_path is missing, expected the folder of the checkpoint"),
    ):  # fmt: skip
        with pytest.raises(ConfigurationError, match=message) as refused:
            made(*overrides)
        assert "\n" not in str(refused.value)
    saved("llama31", tmp_path / "dense")
    dense = [f"upcycle.source={tmp_path}/dense", f"upcycle.output_path={tmp_path}/upcycled"]
    for overrides, message in (
        (["upcycle.num_experts=1"], "num_experts is 1, expected at least 2"),
        (["upcycle.to=hf"], "has the form hf, expected that of NeMo 2"),
        (["training=skywork_dense"], "is an MoE, expected a dense model"),
        (["jobs=[upcycle,plan,training]", f"plan.output_path={tmp_path}/p", "training.plan=auto", "training.edp=1", "training.pipeline_parallelism=2"], "training.plan is 'auto' and jobs has plan, expected one of them"),
    ):  # fmt: skip
        heads = [override.partition("=")[0] for override in overrides]
        kept = [one for one in [*given, *dense] if one.partition("=")[0] not in heads]
        with pytest.raises(ConfigurationError, match=message):
            made(*kept, *overrides)
