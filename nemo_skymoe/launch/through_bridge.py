"""The training job of Megatron-Bridge, from the groups training, data and model. It needs no Megatron-Bridge here."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import nemo_run as run

from nemo_skymoe.architecture import Architecture
from nemo_skymoe.checkpoint import tokenizer
from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.experiments import catalogue
from nemo_skymoe.experiments.arguments import check_renamed
from nemo_skymoe.experiments.command_line import SECTIONS, checked_arguments, spoken
from nemo_skymoe.experiments.planning import planner_options
from nemo_skymoe.launch.bridge_checks import check_checkpoints, check_ranks
from nemo_skymoe.launch.sections import MISSING, check_missing, check_unplanned
from nemo_skymoe.names import unknown

MODULE = "nemo_skymoe.bridge"
LOCAL_PYTHON = Path(".venv-bridge/bin/python")
"""The Python that `make test-bridge` installs."""
TASKS = ("pretrain", "sft", "peft")


@dataclass(frozen=True)
class BridgeTraining:
    """A training of Megatron-Bridge as it will be started."""

    recipe: str
    chosen: catalogue.Chosen
    words: list[str]
    """What follows the module on its command line."""

    @property
    def folder(self) -> str:
        """The folder where the run keeps its checkpoints."""
        return str(Path(self.chosen.given.dir or "nemo_experiments", self.chosen.run.name))

    @property
    def summary(self) -> str:
        """The recipe and its ranks in words."""
        training = self.chosen.run
        ranks = training.num_nodes * training.num_gpus_per_node
        data = ranks // (training.edp * training.pipeline_parallelism)
        experts = 1 if training.architecture.num_moe_experts is None else training.edp
        return (
            f"{self.recipe}: {training.num_nodes} x {training.num_gpus_per_node} = {ranks} ranks,"
            f" PP {training.pipeline_parallelism} x TP {training.edp} x DP {data}, EP {experts}"
        )

    def paths(self) -> Iterator[tuple[str, str]]:
        """Yield the paths that the training reads and writes, by the names of their options."""
        given = self.chosen.given
        yield "dir", given.dir or "nemo_experiments"
        for name, value in {
            "corpus": self.chosen.corpus,
            "dataset": self.chosen.dataset,
            "tokenizer": self.chosen.tokenizer,
            "resume_path": given.resume_path,
            "phases": getattr(given, "phases", None),
        }.items():
            if value is not None:
                yield name, value


def make_training(
    values: Mapping[str, Any], checkpoint: str | None, plan: str | None = None
) -> BridgeTraining:
    """Make the training of the groups training, data and model.

    Args:
        values: The composed groups.
        checkpoint: The checkpoint that the training starts from, unless it is given another.
        plan: The file of `skymoe plan` that says what its pipeline stages are; None leaves that to the recipe.

    Raises:
        ConfigurationError: A recipe or an option does not exist, or a value does not fit.
    """
    section, data = dict(values["training"]), dict(values["data"])
    recipe = _recipe(section.pop("recipe", MISSING), section.pop("task", "pretrain"))
    for name in ("training", "data", "model"):
        check_missing(name, values[name])
    known = catalogue.RECIPES[recipe].__signature__.parameters  # type: ignore[attr-defined]
    shared = {key: data.pop(key) for key in list(data) if key in known}
    if twice := sorted(shared.keys() & section.keys()):
        raise ConfigurationError(
            f"{twice[0]} is given as training.{twice[0]} and as data.{twice[0]}, expected one of them"
        )
    check_renamed(section, "training.")
    if checkpoint is not None:
        section.setdefault("resume_path", checkpoint)
    options = {name: section.pop(name) for name in list(section) if name in SECTIONS and name not in known}
    arguments = checked_arguments(recipe, section | shared, "training.")
    chosen = catalogue.RECIPES[recipe](**arguments)
    model = dict(values["model"])
    if plan is not None:
        check_unplanned("training", section)
        check_unplanned("model", model)
        # In place of the recipe's own stages.
        model |= {"pipeline_plan": plan, "pipeline_model_parallel_layout": None, "pipeline_recompute": None}
    check_ranks(chosen, model)
    overrides = [
        *_overrides(options),
        *_overrides({"dataset": data} if data else {}),
        *_overrides({"model": model} if model else {}),
    ]
    training = BridgeTraining(recipe, chosen, ["--recipe", recipe, *spoken(arguments), *overrides])
    check_checkpoints(chosen, training.folder, values["model"])
    return training


def plan_options(training: BridgeTraining, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of `skymoe plan` for a training, except for the hardware.

    Raises:
        ConfigurationError: An override is a size, which a plan takes from the training.
    """
    sizes = {each.name: getattr(training.chosen.run.architecture, each.name) for each in fields(Architecture)}
    if (corpus := training.chosen.corpus) is not None:
        sizes["vocab_size"] = tokenizer.size(Path(corpus).expanduser() / "tokenizer") or sizes["vocab_size"]
    model = run.Config(Architecture, **{name: size for name, size in sizes.items() if size is not None})
    return {"model": model, **planner_options(training.chosen.run, overrides)}


def task(training: BridgeTraining, python: str | None, executor: Any) -> run.Script:
    """Return what NeMo-Run runs: a process for every task of SLURM, or torchrun's ranks on this machine.

    Raises:
        ConfigurationError: There is no Python with Megatron-Bridge on this machine.
    """
    if isinstance(executor, run.SlurmExecutor):
        return run.Script(
            path=MODULE, m=True, entrypoint=_checked_python(python or "python"), args=training.words
        )
    if python is None and not LOCAL_PYTHON.is_file():
        raise ConfigurationError(
            f"frontdoor.python is missing, expected the Python of an environment with Megatron-Bridge: there is no"
            f" {LOCAL_PYTHON}, which `make test-bridge` installs"
        )
    ranks = str(training.chosen.run.num_gpus_per_node)
    return run.Script(
        path="torch.distributed.run",
        m=True,
        entrypoint=_checked_python(python or str(LOCAL_PYTHON.absolute())),
        args=["--standalone", "--nproc-per-node", ranks, "--tee", "3", "-m", MODULE, *training.words],
    )


def _checked_python(python: str) -> str:
    if "python" not in Path(python).name:
        raise ConfigurationError(
            f"frontdoor.python is {python!r}, expected a Python, such as /venv/bin/python"
        )
    return python


def _recipe(name: Any, kind: Any) -> str:
    models = [
        short.removesuffix("_pretrain_config") for short in catalogue.SHORT_NAMES if "_pretrain_" in short
    ]
    if name not in models:
        raise unknown("training.recipe", str(name), models)
    tasks = [each for each in TASKS if f"{name}_{each}_config" in catalogue.SHORT_NAMES]
    if kind not in tasks:
        raise ConfigurationError(
            f"training.task is {kind!r}, expected {' or '.join(tasks)} for {name} with frontdoor=bridge"
        )
    return catalogue.SHORT_NAMES[f"{name}_{kind}_config"]


def _overrides(options: Mapping[str, Any], path: str = "") -> Iterator[str]:
    """Yield hydra's words for nested options of Bridge."""
    for name, value in options.items():
        if isinstance(value, Mapping) and value:
            yield from _overrides(value, f"{path}{name}.")
        else:
            yield f"{path}{name}={_hydra(value)}"


def _hydra(value: Any) -> str:
    if isinstance(value, str):
        return quoted(value)
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_hydra, value))}]"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{quoted(str(key))}:{_hydra(each)}" for key, each in value.items()) + "}"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)


def quoted(text: str) -> str:
    """Return text between quotes of hydra's grammar, where backslashes count only before a quote."""
    before_quotes = re.sub(r"(\\*)'", lambda found: found[1] * 2 + "\\'", text)
    return "'" + re.sub(r"\\+$", lambda found: found[0] * 2, before_quotes) + "'"
