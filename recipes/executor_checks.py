"""Check the values of an executor: NeMo-Run's scripts cannot quote some of them, and its files would keep secrets.

NeMo-Run writes its folders into commands of the login node, line breaks into #SBATCH lines, and every value into
scripts, logs and saved configurations.
"""

import functools
import os
import re
from collections.abc import Iterator
from typing import Any

import nemo_run as run

from nemo_skymoe import credentials
from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.shell import check_plain, check_variable, check_word


def install() -> None:
    """Check the executors of this machine and of SLURM when they join an experiment, before anything is written."""
    for executor in (run.SlurmExecutor, run.LocalExecutor):
        if not hasattr(executor.assign, "__wrapped__"):
            setattr(executor, "assign", _checked(executor.assign))  # noqa: B010


def _checked(upstream: Any) -> Any:
    @functools.wraps(upstream)
    def assign(self: Any, *args: Any, **kwargs: Any) -> None:
        check_executor(self)
        _inherit(self)
        upstream(self, *args, **kwargs)
        if hasattr(self, "tunnel"):
            check_plain("NEMORUN_HOME, or the name of the job,", self.job_dir)

    return assign


def check_executor(executor: Any, section: str = "") -> None:
    """Refuse values that cannot be quoted, and secrets.

    Args:
        executor: An executor of NeMo-Run's, built.
        section: Text before the names of its options in messages, such as "cluster.".

    Raises:
        ConfigurationError: The message names the option.
    """
    credentials.check_variables(f"{section}env_vars", executor.env_vars)
    for name, value in executor.env_vars.items():
        check_variable(f"{section}env_vars", name, value)
        if value is None and name not in os.environ and not _is_remote(executor):
            raise ConfigurationError(
                f"{section}env_vars names {name} and has no value, expected it in the environment: export {name}"
            )
    if isinstance(executor, run.SlurmExecutor):
        _check_numbers(executor, section)
        _check_slurm(executor, section)


def _check_slurm(executor: Any, section: str) -> None:
    values = {
        name: getattr(executor, name)
        for name in (
            *executor.SBATCH_FLAGS,
            "container_image",
            "container_mounts",
            "srun_args",
            "job_name_prefix",
        )
        if getattr(executor, name, None) is not None
    }
    values |= {
        f"additional_parameters.{name}": value
        for name, value in (executor.additional_parameters or {}).items()
    }
    credentials.check_options(values | {"setup_lines": executor.setup_lines}, section.rstrip("."))
    for name, value in values.items():
        for part in value if isinstance(value, list | tuple) else [value]:
            check_word(section + name, str(part))
    for name in executor.additional_parameters or {}:
        check_plain(f"{section}additional_parameters", name)
    for name in executor.container_env or []:
        check_variable(f"{section}container_env", name)
    for mount in executor.container_mounts:
        if "," in mount:
            raise ConfigurationError(
                f"{section}container_mounts has {mount!r}, expected HOST:CONTAINER without a comma, one an entry"
            )
    for name, value in _plain(executor):
        check_plain(section + name, value)
    if "/" in (executor.job_name_prefix or executor.account):
        name = "job_name_prefix" if executor.job_name_prefix else "account"
        raise ConfigurationError(f"{section}{name} has a /, expected none: the names of logs begin with it")


def slurm_seconds(time: str) -> int:
    """Return a time of SLURM's in seconds. It has the form MM, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS.

    Raises:
        ConfigurationError: It has none of these forms.
    """
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", str(time))
    if match is None:
        raise ConfigurationError(f"time is {time!r}, expected SLURM's form, such as 24:00:00 or 7-00:00:00")
    days, *rest = match.groups()
    parts = [int(part) for part in rest if part is not None]
    if days is None and len(parts) < 3:
        parts = [0, *parts]
    hours, minutes, seconds = (*parts, 0, 0)[:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def _check_numbers(executor: Any, section: str) -> None:
    if executor.retries is not None and (type(executor.retries) is not int or executor.retries < 0):
        raise ConfigurationError(
            f"{section}retries is {executor.retries!r}, expected a whole number of at least 0"
        )
    try:
        slurm_seconds(executor.time)
    except ConfigurationError as refused:
        raise ConfigurationError(f"{section}{refused}") from None


def _plain(executor: Any) -> Iterator[tuple[str, str]]:
    """Yield the values that NeMo-Run gives to a shell, of this machine or by ssh, as they are."""
    yield "dependency_type", executor.dependency_type
    yield "job_dir", executor.tunnel.job_dir
    for name in ("host", "user", "identity"):
        yield f"tunnel.{name}", getattr(executor.tunnel, name, None) or ""
    if executor.job_details.folder:
        yield "job_details.folder", executor.job_details.folder
    if getattr(executor.launcher, "nsys_profile", False):
        for name in ("nsys_folder", "nsys_filename", "nsys_trace", "nsys_extra_args"):
            value = getattr(executor.launcher, name)
            for part in [value] if isinstance(value, str) else value:
                yield f"launcher.{name}", part.replace("%", "")


def _is_remote(executor: Any) -> bool:
    return hasattr(getattr(executor, "tunnel", None), "identity")


def _inherit(executor: Any) -> None:
    """Take variables without a value from the environment, and name them to the container."""
    names = [name for name, value in executor.env_vars.items() if value is None]
    executor.env_vars = {name: value for name, value in executor.env_vars.items() if value is not None}
    if names and getattr(executor, "container_image", None):
        executor.container_env = [*(executor.container_env or []), *names]
