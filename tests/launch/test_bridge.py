"""A training of Megatron-Bridge is launched as NeMo's are: same checks, same quoting, and it starts from what was written before."""

import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import fiddle as fdl
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from nemo_skymoe.commands.launch import jobs
from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.experiments import catalogue
from nemo_skymoe.experiments.command_line import split
from nemo_skymoe.launch.composition import compose_groups
from nemo_skymoe.launch.experiment import dry_run
from nemo_skymoe.launch.jobs import _plan_of
from nemo_skymoe.launch.through_bridge import MODULE, make_training, quoted, task
from nemo_skymoe.recipes.executors import a800_slurm, local_torchrun
from tests.cases import every
from tests.launch.test_hostile_values import HOSTILE, LINES, bash, script_of

__all__ = ["bash"]
BRIDGE = ["frontdoor=bridge", "training=skywork_moe_tiny"]
PLANNED = ["training=skywork_moe_146b", "jobs=[plan,training]", "plan.output_path=/data/p"]
SLURM = [*BRIDGE, "cluster=a800_slurm", "training.dir=/data/runs", "data.corpus=/data/corpus"]


def training(*overrides: str) -> Any:
    return make_training(_values(*overrides), None)


def _values(*overrides: str) -> dict[str, Any]:
    from omegaconf import OmegaConf

    values: Any = OmegaConf.to_container(compose_groups([*BRIDGE, *overrides]), resolve=True)
    return values


def test_whatever_is_given_arrives_byte_for_byte_and_nothing_is_run(bash: Any) -> None:
    """Through NeMo-Run and bash: every value in one command line, and as the path of the Python."""
    usual = training()
    values = [*HOSTILE, *LINES, ""]
    for python in ("/venv/bin/python", "/a 'b $(touch marker) ${x} $$/python"):
        made = replace(usual, words=["--recipe", usual.recipe, *(f"corpus={value}" for value in values)])
        words, _ = bash(script_of(fdl.build(a800_slurm()), task(made, python, fdl.build(a800_slurm()))))
        assert words[words.index("-m") - 1 :] == [python, "-m", MODULE, *made.words]


def test_values_come_through_hydra_and_are_read_as_they_were_given() -> None:
    value = "a 'b\\' \"c\\nd \\ $(touch marker); x\\"
    made = training(f"data.corpus={quoted(value)}", f"training.logger.tensorboard_dir={quoted(value)}")
    arguments, overrides = split(made.recipe, made.words[2:])
    assert arguments == {"corpus": value}
    [parsed] = OverridesParser.create().parse_overrides(overrides)
    assert (parsed.key_or_group, parsed.value()) == ("logger.tensorboard_dir", value)


def test_on_this_machine_the_python_of_bridge_starts_the_ranks(bash: Any, tmp_path: Path) -> None:
    made, executor = training("training.train.train_iters=3"), fdl.build(local_torchrun(gpus_per_node=2))
    executor.launcher = None
    script = dry_run_of(task(made, "/a b/$(touch marker)/python", executor), executor)
    assert "'/a b/$(touch marker)/python'" in script and "--nproc-per-node 2" in script
    assert script.rstrip().endswith("train.train_iters=3")


def dry_run_of(made: Any, executor: Any) -> str:
    return script_of(executor, made)


def test_the_training_starts_from_what_the_upcycling_writes(tmp_path: Path) -> None:
    made = jobs(
        compose_groups([*SLURM, "jobs=[upcycle,training,export]", "upcycle.source=/data/d", "upcycle.output_path=/data/u", "export.output_path=/data/hf"])
    )  # fmt: skip
    upcycle, started, export = made
    assert upcycle.task.to == "bridge" and "resume_path=/data/u" in started.task.args
    assert export.task.source == "/data/runs/skywork_moe_tiny"


def test_the_training_takes_the_plan_that_is_the_same_through_both_doors() -> None:
    plans, trainings = [], []
    for door in ("nemo", "bridge"):
        words = [f"frontdoor={door}", *PLANNED, "cluster=a800_slurm", "training.dir=/data/runs"]
        planning, training = jobs(compose_groups(words))
        options = fdl.ordered_arguments(planning.task)
        plans.append((_plan_of(planning.task), options["num_gpus"], options["capacity_factor"]))
        trainings.append(training)
    assert plans[0] == plans[1] and plans[0][1:] == (1536, 1.25)
    words = trainings[1].task.args
    assert "model.pipeline_plan='/data/p'" in words and "model.pipeline_model_parallel_layout=null" in words


def test_slurm_warns_the_ranks_before_the_end_and_requeues_what_has_left(tmp_path: Path) -> None:
    script = dry_run(jobs(compose_groups([*SLURM, "cluster.saving_seconds=120"])))
    assert "#SBATCH --signal=15@120" in script and "trap requeue_if_stopped EXIT" in script
    assert f"python -m {MODULE}" in script and "--ntasks-per-node=2" in script
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_every_recipe_can_be_launched() -> None:
    for short, full in catalogue.SHORT_NAMES.items():
        if full not in catalogue.FIXED:
            continue  # it needs a checkpoint: tests/experiments/test_own_model.py
        model, task_name, _ = short.rsplit("_", 2)
        made = training(f"training.recipe={model}", f"training.task={task_name}")
        assert made.recipe == full and split(full, made.words[2:])[0] == {}


@every(
    refused=[
        (["training.recipe=skywork_moe_tny"], "training.recipe skywork_moe_tny is unknown: did you mean skywork_moe_tiny"),
        (["training.task=finetune"], "training.task is 'finetune', expected pretrain or sft or peft"),
        (["training.edpp=2"], "option training.edpp is unknown: did you mean training.edp"),
        (["training.global_batch_size=x"], "training.global_batch_size is 'x', expected int"),
        (["training.micro_batch_size=3"], "training.global_batch_size is 8, expected a multiple of micro_batch_size=3"),
        (["training.edp=3"], "training has 2 ranks, expected a multiple of edp=3"),
        (["training.stages=x"], "stages is now called phases"),
        (["jobs=[plan,training]"], "plan.output_path is missing, expected plan.output_path=VALUE"),
        ([*PLANNED, "training.pipeline_layout=Et*12|t*12L"], "training.pipeline_layout is 'Et\\*12|t\\*12L' and jobs has plan, expected one"),
        ([*PLANNED, "training.pipeline_recompute=[[1],[0]]"], r"training.pipeline_recompute is \[\[1\], \[0\]\] and jobs has plan"),
        ([*PLANNED, "+model.pipeline_model_parallel_layout=Et*12|t*12L"], "model.pipeline_model_parallel_layout is .* and jobs has plan"),
        ([*PLANNED, "+model.tensor_model_parallel_size=4"], "model.tensor_model_parallel_size is 4, expected none with a plan"),
        (["frontdoor.pyton=x"], "option frontdoor.pyton is unknown: did you mean frontdoor.python"),
        (["frontdoor.python=/bin/bash"], "frontdoor.python is '/bin/bash', expected a Python"),
        (["cluster=a800_slurm"], "training.dir is runs, expected an absolute path"),
        (["cluster=a800_slurm", "training.dir=/elsewhere"], "training.dir is /elsewhere, expected a path below"),
        (["cluster=a800_slurm", "training.dir=/data/r", "data.corpus=/data/c", "cluster.fault_tolerance=true"], "fault_tolerance is True, expected False"),
        (["jobs=[conversion,training]", "conversion.source=/a", "conversion.output_path=/b"], "conversion.to is 'nemo', expected bridge"),
        ([], "frontdoor.python is missing, expected the Python of an environment with Megatron-Bridge"),
    ]
)  # fmt: skip
def test_what_cannot_work_is_refused_by_name(
    refused: tuple[list[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides, message = refused
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigurationError, match=message):
        jobs(compose_groups([*BRIDGE, *overrides]))
