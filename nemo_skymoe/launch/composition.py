"""Compose a configuration by hydra from a command line and folders of YAML. `jobs` says what it means."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from nemo_skymoe import credentials
from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.names import unknown

JOBS = ("conversion", "upcycle", "plan", "training", "export")
"""The jobs in their order."""
GROUPS = ("cluster", "frontdoor", "model", "data", *JOBS)


def compose_groups(overrides: Sequence[str], config_dir: Path | None = None) -> DictConfig:
    """Compose `conf/`, and `config_dir` after it, under `overrides` in hydra's grammar.

    Keys inside a group need no `+`, whether the YAML has them or not, because it does not have the values of the
    recipes.

    Raises:
        ConfigurationError: An override cannot be parsed, a group, an option or a job is unknown, an override is a
            sweep, the folder does not exist, or a value looks like a secret.
    """
    parsed = _parse(overrides)
    lines = [_forced(override) for override in parsed]
    if config_dir is not None:
        if not config_dir.is_dir():
            raise ConfigurationError(f"config_dir is {config_dir}, expected an existing folder")
        lines.append(f"hydra.searchpath=[file://{config_dir.absolute()}]")
    with initialize_config_module("nemo_skymoe.conf", version_base="1.3"):
        for override in parsed:
            _check_option(override, config_dir)
        try:
            composed = compose("config", overrides=lines)
        except (HydraException, OmegaConfBaseException, YAMLError) as refused:
            raise ConfigurationError(_one_sentence(refused)) from None
    _check_top(composed)
    credentials.check_options(OmegaConf.to_container(composed))
    return composed


def _parse(overrides: Sequence[str]) -> list[Override]:
    for line in overrides:  # before a message can repeat one
        option, _, value = line.partition("=")
        credentials.check_text(option, line)
        credentials.check_text(option, value)
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    except HydraException as refused:
        raise ConfigurationError(_one_sentence(refused)) from None
    for override in parsed:
        head = override.key_or_group.split(".")[0].split("/")[0]
        _check_group(head)
        if override.is_sweep_override():
            raise ConfigurationError(
                f"{override.input_line} is a sweep, expected one value: a launch is one experiment"
            )
    return parsed


def _check_group(name: str) -> None:
    if name == "stages":
        raise ConfigurationError("stages is now called jobs, expected jobs=[...] in its place")
    if name not in (*GROUPS, "jobs"):
        refused = unknown("group", name, (*GROUPS, "jobs"))
        if "did you mean" in str(refused):
            raise refused
        raise ConfigurationError(
            f"{refused}; an option of a group begins with the group, as in training.{name}=VALUE"
        )


def _forced(override: Override) -> str:
    line = str(override.input_line)
    inside = "." in override.key_or_group
    return f"++{line}" if inside and override.type is OverrideType.CHANGE else line


def _check_option(override: Override, config_dir: Path | None) -> None:
    group, option = override.key_or_group, override.value()
    if group not in GROUPS or override.type is OverrideType.DEL:
        return
    if not isinstance(option, str):
        raise ConfigurationError(f"{group} is {option}, expected a name of conf/{group}")
    options = set(GlobalHydra.instance().config_loader().get_group_options(group, ObjectType.CONFIG))
    if config_dir is not None:
        options |= {file.stem for file in (config_dir / group).glob("*.yaml")}
    if option not in options:
        raise unknown(group, option, options)


def _check_top(composed: DictConfig) -> None:
    for key in composed:
        _check_group(str(key))
    for group in GROUPS:
        if not isinstance(composed.get(group), DictConfig):
            raise ConfigurationError(f"{group} is {composed.get(group)!r}, expected a name of conf/{group}")
    jobs: Any = composed.jobs
    if isinstance(jobs, str) or not jobs:
        raise ConfigurationError(f"jobs is {jobs!r}, expected a list such as [upcycle,training]")
    for job in jobs:
        if job not in JOBS:
            raise unknown("job", str(job), JOBS)
    if list(jobs) != [job for job in JOBS if job in jobs]:
        raise ConfigurationError(
            f"jobs is [{','.join(jobs)}], expected every job once, in the order {', '.join(JOBS)}"
        )


def _one_sentence(refused: Exception) -> str:
    text = str(refused)
    return " ".join((text if isinstance(refused, YAMLError) else text.split("\n")[0]).split())
