"""Run the benchmarks of Table 1 on an exported model, with lm-evaluation-harness."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from nemo_skymoe import gpus
from nemo_skymoe.checkpoint import foreign
from nemo_skymoe.checkpoint.hugging_face.remote_code import check_code
from nemo_skymoe.checkpoint.hugging_face.storage import SafetensorsStorage
from nemo_skymoe.config import ConfigurationError

_REMOTE_CODE, _INCLUDE = "trust_remote_code", "include"
_LARGEST = 1 << 20
# The harness' templates are not sandboxed: by its attributes every value leads to every module.
_LEADS_OUT = re.compile(r"__|\battr\s*\(|\|\s*attr\b|\\x5f|\\u005f|\\137", re.IGNORECASE)


@dataclass(frozen=True)
class Benchmark:
    """A task of the harness, its metric, and the report's figure.

    The report says neither how many shots nor which prompts it uses. The shots are those that are customary for base
    models (the harness' own, if it has any), and the prompts are the harness'.
    """

    title: str
    task: str
    shots: int
    metric: str
    reported: float
    """The report's figure for the 146B model, in percent (Table 1)."""
    runs_code: bool = False


TABLE_1 = (
    Benchmark("C-Eval", "ceval-valid", 5, "acc,none", 82.2),
    Benchmark("CMMLU", "cmmlu", 5, "acc,none", 79.5),
    Benchmark("MMLU", "mmlu", 5, "acc,none", 77.4),
    Benchmark("GSM8K", "gsm8k", 5, "exact_match,strict-match", 76.1),
    Benchmark("MATH", "hendrycks_math", 4, "exact_match,none", 31.9),
    Benchmark("HumanEval", "humaneval", 0, "pass@1,create_test", 43.9, runs_code=True),
)
"""The six benchmarks. C-Eval is its validation split, because the answers of its test are not public. MATH is compared
as normalised text."""


@dataclass(frozen=True)
class Score:
    """A metric of a task and, if the harness has one, its standard error, as shares and not in percent."""

    task: str
    shots: int | None
    metric: str
    value: float
    error: float | None
    reported: float | None = None


def evaluate(
    model: Path,
    tasks: Sequence[str],
    *,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 1,
    dtype: str = "auto",
    allow_code: bool = False,
) -> list[Score]:
    """Evaluate a Hugging Face checkpoint. Of its code, only the modeling files that `skymoe convert` writes are run.

    Args:
        model: Folder that `skymoe convert --to hf` wrote, or any other of its form.
        tasks: `table1`, names of the harness, or YAML files of its form.
        num_fewshot: Instead of a task's own number; not for `table1`, whose shots are fixed.
        limit: Documents of each task, for a trial.
        batch_size: Requests at a time.
        dtype: As torch names it; "auto" is the checkpoint's.
        allow_code: Run programs that the model writes, as HumanEval has to, and functions that a task's file names.

    Raises:
        ConfigurationError: No harness, no such checkpoint or task, data that cannot be loaded, HumanEval or functions
            of a task without `allow_code`, or a checkpoint with code of its own.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigurationError(
            "evaluation needs lm-evaluation-harness, which is not installed: pip install -e '.[nemo,eval]'"
        )
    has_code = _check_model(model)
    known = {benchmark.task: benchmark for benchmark in TABLE_1}
    names = [name for task in tasks for name in (known if task == "table1" else (task,))]
    if num_fewshot is not None and "table1" in tasks:
        raise ConfigurationError(
            f"num_fewshot is {num_fewshot}, expected none for table1: name the tasks instead"
        )
    files = {
        name: _checked_task(Path(name), allow_code) for name in names if name.endswith((".yaml", ".yml"))
    }
    names = [files.get(name, name) for name in names]
    folders = [str(Path(file).absolute().parent) for file in files]
    manager = importlib.import_module("lm_eval.tasks").TaskManager(include_path=folders or None)
    for name in names:
        _check_task(name, manager, allow_code)
    loaded = _load(model, batch_size, dtype, has_code)
    scores: list[Score] = []
    for name in names:
        benchmark = known.get(name) if num_fewshot is None else None
        shots = benchmark.shots if benchmark else num_fewshot
        found = _run(name, loaded, manager, shots, limit, allow_code)
        scores += [_score(found, name, benchmark)] if benchmark else _scores(found)
    return scores


def _check_model(model: Path) -> bool:
    """Refuse a model that cannot be evaluated safely, and say whether its modeling files have to be run."""
    names = ("weights", "run_config.yaml", "latest_train_state.pt")
    if any((model / name).exists() for name in names):
        raise ConfigurationError(
            f"'{model}' is a checkpoint of NeMo or Megatron-Bridge: export it first with skymoe convert {model} FOLDER"
            " --to hf"
        )
    if not (model / "config.json").is_file():
        raise ConfigurationError(f"'{model}' has no config.json, expected the folder of an exported model")
    foreign.refuse_folder(model, is_model=True)
    has_code = check_code(model)
    SafetensorsStorage(model)  # refuses pickles, and an index that leads out of the folder
    return has_code


def _check_task(name: str, manager: Any, allow_code: bool) -> None:
    if name not in manager.all_tasks:
        raise ConfigurationError(
            f"lm-evaluation-harness has no task '{name}', expected table1, one of `lm_eval --tasks list`, or a YAML file"
        )
    if any(one.runs_code for one in TABLE_1 if one.task == name) and not allow_code:
        raise ConfigurationError(
            f"'{name}' runs the programs that the model writes, on this machine: allow it with --allow-code, or name"
            " other tasks"
        )


def _load(model: Path, batch_size: int, dtype: str, has_code: bool) -> Any:
    import torch

    language_model = importlib.import_module("lm_eval.models.huggingface").HFLM
    return language_model(
        pretrained=str(model),
        trust_remote_code=has_code,
        dtype=dtype,
        batch_size=batch_size,
        device=gpus.device(),
        parallelize=torch.cuda.device_count() > 1,
    )


def _run(
    name: str, model: Any, manager: Any, shots: int | None, limit: int | None, allow_code: bool
) -> dict[str, Any]:
    if allow_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"  # the metric itself asks for this
    try:
        found = importlib.import_module("lm_eval.evaluator").simple_evaluate(
            model=model,
            tasks=[name],
            task_manager=manager,
            num_fewshot=shots,
            limit=limit,
            log_samples=False,
            confirm_run_unsafe_code=allow_code,
        )
    except OSError as reason:  # a data set that is neither here nor can be reached
        raise ConfigurationError(f"the data of the task '{name}' cannot be loaded: {reason}") from reason
    assert found is not None
    return found


def _score(found: dict[str, Any], task: str, benchmark: Benchmark) -> Score:
    results = found["results"][task]
    return Score(
        benchmark.title,
        benchmark.shots,
        benchmark.metric,
        results[benchmark.metric],
        _error(results, benchmark.metric),
        benchmark.reported / 100,
    )


def _scores(found: dict[str, Any]) -> list[Score]:
    """Return every metric of a task, or of a group as a whole."""
    tasks = found.get("groups") or found["results"]
    return [
        Score(task, found["n-shot"].get(task), metric, value, _error(results, metric))
        for task, results in tasks.items()
        for metric, value in results.items()
        if "," in metric and "_stderr," not in metric and isinstance(value, int | float)
    ]


def _error(results: dict[str, Any], metric: str) -> float | None:
    error = results.get(metric.replace(",", "_stderr,"))
    return error if isinstance(error, int | float) else None


class _Function(str):
    """The value of a `!function` in a task's file."""


class _TaskLoader(yaml.SafeLoader):
    """Reads a task's file without importing the functions that it names."""


_TaskLoader.add_multi_constructor("!", lambda loader, tag, node: _Function(f"!{tag} {node.value}"))


def _checked_task(file: Path, allow_code: bool) -> str:
    """Return the task that a file defines. The harness finds it by its folder.

    Args:
        file: A YAML file.
        allow_code: Whether its functions and templates may do anything.

    Raises:
        ConfigurationError: The file is missing or damaged, names no task, or would run code that is not allowed.
    """
    config = _read(file)
    if not isinstance(config, dict) or not isinstance(config.get("task"), str):
        raise ConfigurationError(f"'{file}' names no task, expected a task of lm-evaluation-harness")
    if not allow_code:
        _check(config, file, {file.resolve()})
    return str(config["task"])


def _read(file: Path) -> Any:
    if not file.is_file():
        raise ConfigurationError(f"the task '{file}' is not there, expected a YAML file")
    try:
        if file.stat().st_size > _LARGEST:
            raise ValueError(f"{file.stat().st_size:,} bytes")
        return yaml.load(file.read_text(), _TaskLoader)
    except (OSError, yaml.YAMLError, ValueError, RecursionError) as reason:
        said = " ".join(str(reason).split())
        raise ConfigurationError(f"the task '{file}' cannot be read: {said}") from None


def _check(config: Any, file: Path, seen: set[Path]) -> None:
    for key, value in _pairs(config):
        what = None
        if isinstance(value, _Function):
            what = f"names a function, '{value}'"
        elif _REMOTE_CODE in str(key) and value:
            what = f"sets {_REMOTE_CODE}"
        elif isinstance(value, str) and "{" in value and _LEADS_OUT.search(value):
            what = "has a template that reaches into Python"
        if what:
            raise ConfigurationError(
                f"the task '{file}' {what}, which would be run on this machine: allow it with --allow-code, or give a"
                " task of plain values"
            )
        if key == _INCLUDE:
            for name in value if isinstance(value, list) else [value]:
                included = file.parent / str(name)
                if included.is_file() and included.resolve() not in seen:
                    seen.add(included.resolve())
                    _check(_read(included), included, seen)


def _pairs(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield keys and values of every dictionary, and the items of every list, in a value, visiting each once."""
    waiting, seen = [value], set[int]()
    while waiting:
        one = waiting.pop()
        if not isinstance(one, dict | list) or id(one) in seen:
            continue
        seen.add(id(one))
        pairs = list(one.items()) if isinstance(one, dict) else [(None, item) for item in one]
        yield from pairs
        waiting += [item for _, item in pairs]
