"""Refuse secrets that are given by value: scripts, logs and saved configurations keep every value.

Secrets are passed by name, through the environment.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from nemo_skymoe.config import ConfigurationError

_VARIABLE = re.compile(
    r"(?i)(^|_)(token|credentials?|pat|apikey|auth)$|(api|access|secret|private|encryption|wandb|ngc|hf)_?key(_id)?$"
    r"|(pass(word|wd|phrase)|secret)|^aws_"
)
_NO_SECRET = re.compile(
    r"(?i)_(file|path|dir|url|name|timeout|ttl)$|^aws_(default_)?(region|profile|output|ca_bundle|max_attempts|retry_mode)$"
)
"""Variables that say where something is, or how to behave."""
_OPTION = re.compile(
    r"(?i)^(.*_)?(pass(word|wd|phrase)|secret|api_?key|credentials?)$|^((wandb|hf|access|auth)_)?(key|token)$"
)
"""Names of options that hold secrets. They differ from names of variables: the option `eod_token` is no secret."""
_VALUE = re.compile(
    r"\b(hf_|sk-|gh[pousr]_|github_pat_|glpat-|nvapi-|wandb_v\d_|xox[abprs]-|AIza)[\w-]{12,}|\bA[KS]IA[0-9A-Z]{12,}"
    r"|\beyJ[\w-]{8,}\.[\w-]{8,}\.|-----BEGIN [A-Z ]*PRIVATE KEY"
    r"|://[^/@\s#]*:[^/@\s]+@|^[^/@\s:=]+:[^/@\s:]+@(?!sha\d+:)"  # USER:PASSWORD@HOST, but not IMAGE:TAG@sha256:DIGEST
)
_KEY = re.compile(r"\b([0-9a-fA-F]{32,}|[A-Za-z0-9+_-]{40,}={0,2})(?![\w/])")
_ASSIGNMENT = re.compile(
    r"\b(?=([A-Za-z_]\w*)[\"']?\s*[:=]\s*(\"[^\"]*\"|'[^']*'|[^\s,;{}()\[\]\"']+))"
)  # looked ahead: in `--export=NAME=VALUE` the value of one is another
_REFERENCE = re.compile(r"(?i)(null|none|~|\?\?\?)?|\$.*")


def refusal(option: str, variable: str = "NAME") -> ConfigurationError:
    """Return the error for a secret that was given as a value. Its message does not repeat the value."""
    return ConfigurationError(
        f"{option} is given what looks like a secret: secrets are passed by name from the environment, never by value;"
        f" export {variable} where you launch, and give env_vars={{{variable}: null}}"
    )


def check_variables(option: str, variables: Mapping[str, Any]) -> None:
    """Refuse environment variables with a secret as their value. None stands for the name alone.

    Raises:
        ConfigurationError: A value looks like a secret. The message has the option and the variable, and not the value.
    """
    for name, value in variables.items():
        if value is not None and _is_secret(str(name), str(value)):
            raise refusal(f"{option}.{name}", str(name))


def check_options(values: Any, option: str = "") -> None:
    """Refuse secrets anywhere in nested options.

    Raises:
        ConfigurationError: A value looks like a secret. The message has the option, and not the value.
    """
    for place, text in _texts(values, option):
        parent, _, name = place.rpartition(".")
        if parent.rpartition(".")[2] == "env_vars":
            check_variables(parent, {name: text})
        elif _looks_secret(name, text) or (_OPTION.search(name) and not _REFERENCE.fullmatch(text)):
            raise refusal(place)
        else:
            check_text(place, text)


def check_text(option: str, text: str) -> None:
    """Refuse secrets in text that assigns variables, such as lines of a shell or an override.

    Raises:
        ConfigurationError: A value looks like a secret. The message has the option and the variable, and not the value.
    """
    for name, value in _ASSIGNMENT.findall(text):
        value = value.strip("\"'")
        suspect = _OPTION.search(name) if name.islower() else _is_secret(name, value)
        if suspect and not _REFERENCE.fullmatch(value):
            raise refusal(option, "NAME" if name.islower() else name)
    if _VALUE.search(text):
        raise refusal(option)


def _is_secret(variable: str, value: str) -> bool:
    named = _VARIABLE.search(variable) and not _NO_SECRET.search(variable)
    return bool(value and named) or _looks_secret(variable, value)


def _looks_secret(name: str, value: str) -> bool:
    keyed = re.search(r"(?i)key|secret|auth|cred|(^|_)token$", name)
    return bool(_VALUE.search(value) or (keyed and "/" not in value and _KEY.search(value)))


def _texts(values: Any, option: str) -> Iterator[tuple[str, str]]:
    if isinstance(values, Mapping):
        for name, part in values.items():
            yield from _texts(part, f"{option}.{name}" if option else str(name))
    elif isinstance(values, list | tuple):
        for part in values:
            yield from _texts(part, option)
    elif values is not None and not isinstance(values, bool):
        yield option, str(values)
