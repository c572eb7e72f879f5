"""The jobs of an experiment. A job has a task, an executor, and NeMo-Run's plugins.

A recipe or an executor decides everything that is theirs to decide; nothing of it is decided here.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fiddle as fdl
import nemo_run as run
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_skymoe import credentials
from nemo_skymoe.architecture import as_architecture
from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.launch.paths import check_each, check_paths
from nemo_skymoe.launch.planner_options import planner_options
from nemo_skymoe.launch.recipe import check_recipe, make_recipe
from nemo_skymoe.launch.sections import MISSING, check_missing, check_unplanned, configure, set_values
from nemo_skymoe.launch.through_bridge import BridgeTraining, make_training, plan_options, task
from nemo_skymoe.launch.to_come import expected
from nemo_skymoe.names import unknown
from nemo_skymoe.nemo.checks import run_folder
from nemo_skymoe.nemo.pipeline import PipelinePlan, written_plan
from nemo_skymoe.nemo.recipe_check import built, check_start, plan_of
from nemo_skymoe.pipeline.texts import planned
from nemo_skymoe.recipes.executor_checks import check_executor
from nemo_skymoe.recipes.executors import EXECUTORS, plugins
from nemo_skymoe.shell import word

Tasks = Mapping[str, Callable[..., None]]
"""The functions that NeMo-Run runs for the jobs conversion, upcycle, plan and export, by the job's name."""


@dataclass(frozen=True)
class Job:
    """One job of an experiment."""

    name: str
    summary: str
    task: Any  # run.Partial, or run.Script for Megatron-Bridge
    executor: Any
    plugins: list[run.Plugin]


def jobs(composed: DictConfig, tasks: Tasks) -> list[Job]:
    """Return the jobs of a composed configuration in their order, each checked as far as that is possible here.

    A job reads what the earlier ones write, unless it is given something else: an upcycling and a training read a
    checkpoint, a training reads its plan, and an export reads the run.

    Args:
        composed: The composed groups.
        tasks: The commands of the jobs that are not trainings.

    Raises:
        ConfigurationError: A key, a recipe or an executor does not exist, and the message proposes the nearest one; or
            a value is missing or does not fit.
    """
    try:
        values: Any = OmegaConf.to_container(composed, resolve=True)
    except OmegaConfBaseException as refused:
        raise ConfigurationError(" ".join(str(refused).split())) from None
    credentials.check_options(values)
    if _door(values) == "bridge":
        return _jobs_of_bridge(values, tasks)
    found: dict[str, Job] = {}
    checkpoint: str | None = None
    for name in values["jobs"]:
        if name in ("conversion", "upcycle"):
            found[name] = _command(name, tasks[name], values, _source(checkpoint))
            checkpoint = found[name].task.output_path
            continue
        with expected(values["training"], _writing(found)):
            recipe = make_recipe(values, checkpoint)
        if name == "plan":
            found[name] = _command(name, tasks[name], values, planner_options(recipe))
        elif name == "training":
            found[name] = _training(values, recipe, found.get("plan"), checkpoint)
        else:
            found[name] = _command(name, tasks[name], values, {"source": str(run_folder(recipe.log))})
    return list(found.values())


def _writing(found: Mapping[str, Job]) -> dict[str, Any]:
    """Return the tasks that write checkpoints before a training, in their order."""
    return {name: job.task for name, job in found.items() if name in ("conversion", "upcycle")}


def _source(checkpoint: str | None) -> dict[str, Any]:
    return {} if checkpoint is None else {"source": checkpoint}


def _door(values: dict[str, Any]) -> str:
    """Return the front door of the training, by the group frontdoor."""
    section = values["frontdoor"]
    door = section.get("door")
    known = {"nemo": {"door"}, "bridge": {"door", "python"}}
    if door not in known:
        raise unknown("frontdoor.door", str(door), known)
    for name in section:
        if name not in known[door]:
            raise unknown("option", f"frontdoor.{name}", [f"frontdoor.{each}" for each in known[door]])
    return door


def _jobs_of_bridge(values: dict[str, Any], tasks: Tasks) -> list[Job]:
    """Return the jobs around a training of Megatron-Bridge, which starts from a checkpoint in its own format."""
    checkpoint: str | None = None
    plan: str | None = None
    found: dict[str, Job] = {}
    writing = [name for name in values["jobs"] if name in ("conversion", "upcycle")]
    for name in values["jobs"]:
        if name in writing:
            read_by_training = name == writing[-1] and "training" in values["jobs"]
            given = _source(checkpoint) | ({"to": "bridge"} if read_by_training else {})
            job = _command(name, tasks[name], values, given)
            if read_by_training and job.task.to != "bridge":
                raise ConfigurationError(
                    f"{name}.to is {job.task.to!r}, expected bridge, which the training with frontdoor=bridge reads"
                )
            checkpoint = job.task.output_path
        else:
            if name == "plan":
                plan = values["plan"].get("output_path", MISSING)
            with expected(values["training"], _writing(found)):
                training = make_training(values, checkpoint, plan)
            if name == "training":
                job = _bridge_training(values, training)
            else:
                derived = (
                    plan_options(training, values["model"]) if name == "plan" else {"source": training.folder}
                )
                job = _command(name, tasks[name], values, derived)
        found[name] = job
    return list(found.values())


def _bridge_training(values: dict[str, Any], training: BridgeTraining) -> Job:
    run_sizes = training.chosen.run
    executor, chosen = _executor(
        values["cluster"], run_sizes.num_nodes, run_sizes.num_gpus_per_node, script=True
    )
    check_each("training", training.paths(), executor)
    if not isinstance(executor, run.SlurmExecutor):
        executor.launcher = None  # the Python of Megatron-Bridge starts its own ranks
    started = task(training, values["frontdoor"].get("python"), executor)
    return Job("training", training.summary, started, executor, chosen)


def _command(name: str, command: Callable[..., None], values: dict[str, Any], derived: dict[str, Any]) -> Job:
    """Make a job of a command of skymoe in one process. `derived` are options that its group may replace."""
    given = {
        option: value for option, value in values[name].items() if option not in derived or value != MISSING
    }
    check_missing(name, derived | given)
    task = run.Partial(command, **{option: value for option, value in derived.items() if option not in given})
    set_values(name, task, given)
    arguments = fdl.ordered_arguments(task)
    for parameter in inspect.signature(command).parameters.values():
        if parameter.default is parameter.empty and parameter.name not in arguments:
            raise ConfigurationError(
                f"{name}.{parameter.name} is missing, expected {name}.{parameter.name}=VALUE"
            )
    executor, _ = _executor(values["cluster"], nodes=1, gpus_per_node=None)
    check_paths(name, task, executor)
    if name == "plan":
        _plan_of(task)
    shown = " ".join(word(f"{key}={_as_text(value)}") for key, value in arguments.items())
    return Job(name, f"nemo skymoe {command.__name__} {shown}", task, executor, [])


def _as_text(value: Any) -> Any:
    """Return the value of an option as it would be given on the command line."""
    if not isinstance(value, fdl.Buildable):
        return value
    sizes = fdl.ordered_arguments(value).items()
    return ",".join(
        f"{name}={[*size] if isinstance(size, tuple) else int(size)}" for name, size in sizes
    ).replace(" ", "")


def _plan_of(task: run.Partial) -> PipelinePlan | None:
    """Return the plan that the job will write; None if it needs a profile that is not on this machine."""
    options: dict[str, Any] = {str(name): value for name, value in fdl.ordered_arguments(task).items()}
    options["model"] = as_architecture(built(options["model"], "model"))
    del options["output_path"]
    if profile := options.pop("profile", None):
        if not Path(profile).is_file():
            return None
        options["profile"] = Path(profile)
    plan = planned(**options)
    return PipelinePlan(plan.layout, plan.recompute)


def _training(values: dict[str, Any], recipe: Any, planning: Job | None, checkpoint: str | None) -> Job:
    section = values["training"]
    if planning is not None:
        check_unplanned("training", section)
        recipe.pipeline = run.Config(written_plan, file=planning.task.output_path)
        plan = _plan_of(planning.task)
    else:
        plan = plan_of(recipe)
    layout = check_recipe(recipe, plan)
    trainer = recipe.trainer
    executor, chosen = _executor(values["cluster"], trainer.num_nodes, trainer.devices)
    check_paths("training", recipe, executor)
    written = checkpoint is not None and section.get("resume_path") is None
    check_start(recipe, local=not isinstance(executor, run.SlurmExecutor), written_before=written)
    kind = section.get("task", "pretrain")
    return Job("training", f"{kind} {section['recipe']}: {layout}", recipe, executor, chosen)


def _executor(
    cluster: dict[str, Any], nodes: int, gpus_per_node: int | None, *, script: bool = False
) -> tuple[Any, list[run.Plugin]]:
    """Return the executor and its plugins. Without `gpus_per_node` it is one plain process on one node.

    `script` says that the task is a command line, which takes no callbacks.
    """
    section = dict(cluster)
    name = section.pop("executor", MISSING)
    if not isinstance(name, str) or name not in EXECUTORS:
        raise unknown("cluster.executor", str(name), EXECUTORS)
    for size in ("nodes", "gpus_per_node"):
        if size in section:
            raise ConfigurationError(
                f"cluster.{size} is given, expected training.num_nodes and its devices to say it"
            )
    chosen = {
        key: section.pop(key)
        for key in inspect.signature(plugins).parameters
        if key in section and key != "script"
    }
    sizes = {"nodes": nodes, "gpus_per_node": gpus_per_node or 1}
    one_node = "nodes" not in inspect.signature(EXECUTORS[name]).parameters
    if one_node and sizes.pop("nodes") > 1:
        raise ConfigurationError(f"training.num_nodes is {nodes}, expected 1 on cluster.executor={name}")
    made = configure("cluster", EXECUTORS[name], section | sizes)
    if gpus_per_node is None:
        made.launcher, made.env_vars = None, section.get("env_vars", {})
        if made.__fn_or_cls__ is run.SlurmExecutor:
            made.gpus_per_node = None
    executor = fdl.build(made)
    check_executor(executor, "cluster.")
    return executor, plugins(**chosen, script=script)
