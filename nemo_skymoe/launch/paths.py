"""Check the paths of a job that runs in a container on another machine: they have to be mounted there."""

from collections.abc import Iterable, Iterator
from pathlib import PurePosixPath
from typing import Any

import nemo_run as run

from nemo_skymoe.config import ConfigurationError


def check_paths(job: str, task: Any, executor: Any) -> None:
    """Refuse a path of `task` that SLURM's nodes would not find, or would write to and lose with the container."""
    check_each(job, _paths(task), executor)


def check_each(job: str, paths: Iterable[tuple[str, str]], executor: Any) -> None:
    """Refuse a path as `check_paths` does, of `paths` by the names of their options."""
    if not isinstance(executor, run.SlurmExecutor):
        return
    mounts = [PurePosixPath((*mount.split(":"), mount)[1]) for mount in executor.container_mounts]
    for name, text in paths:
        if "://" in text:
            continue
        path = PurePosixPath(text)
        if not path.is_absolute():
            raise ConfigurationError(f"{job}.{name} is {text}, expected an absolute path")
        if mounts and not any(path.is_relative_to(mount) for mount in mounts):
            places = ", ".join(map(str, mounts))
            raise ConfigurationError(
                f"{job}.{name} is {text}, expected a path below one of cluster.container_mounts: {places}"
            )


def _paths(task: Any) -> Iterator[tuple[str, str]]:
    for name in ("source", "output_path", "config", "profile"):
        if isinstance(value := getattr(task, name, None), str):
            yield name, value
    for name, value in (getattr(task, "further_sources", None) or {}).items():
        yield f"further_sources.{name}", value
    if log := getattr(task, "log", None):
        yield "dir", log.log_dir or "nemo_experiments"  # NeMo's default
    if restore := getattr(getattr(task, "resume", None), "restore_config", None):
        yield "resume_path", restore.path
    if file := getattr(getattr(task, "pipeline", None), "file", None):
        yield "pipeline.file", file
    for name in ("corpus", "dataset_root"):
        if isinstance(value := getattr(getattr(task, "data", None), name, None), str):
            yield {"dataset_root": "dataset"}.get(name, name), value
