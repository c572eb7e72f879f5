"""Turn values that a user gives into words of a shell or of SLURM: they are quoted, or the message names the option."""

import re
import shlex

from nemo_skymoe.config import ConfigurationError

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def word(value: str) -> str:
    """Return `value` as one word of bash, on one line."""
    if not _CONTROL.search(value):
        return shlex.quote(value)
    escaped = re.sub(r"[\\']", r"\\\g<0>", value)
    return "$'" + _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", escaped) + "'"


def sbatch_word(value: str) -> str:
    """Return `value` as a part of an #SBATCH line.

    Unlike bash, sbatch reads backslashes within quotes, and looks for `hetjob`.
    """
    escaped = re.sub(r"[^\w@%+=:,./-]", r"\\\g<0>", value)
    return re.sub("(het|pack)(job)", r"\1\\\2", escaped, flags=re.IGNORECASE)


def check_word(option: str, value: str) -> None:
    """Refuse a value that cannot be on one line: it has line breaks or other control characters.

    Raises:
        ConfigurationError: The message names the option.
    """
    if _CONTROL.search(value):
        raise ConfigurationError(f"{option} is {value!r}, expected no line break and no control character")


def check_plain(option: str, value: str) -> None:
    """Refuse a value that a shell, or SLURM's patterns of file names, would read as something else.

    This is for values that NeMo-Run gives to a shell as they are.

    Raises:
        ConfigurationError: The message names the option.
    """
    if value and (shlex.quote(value) != value or "%" in value):
        raise ConfigurationError(
            f"{option} is {value!r}, expected letters, digits and _ - . / : @ + = , alone"
        )


def check_variable(option: str, name: str, value: str | None = None) -> None:
    """Refuse an environment variable whose name bash cannot export, or whose value ends early.

    Raises:
        ConfigurationError: The message names the option.
    """
    if not _VARIABLE.fullmatch(name):
        raise ConfigurationError(
            f"{option} has a variable called {name!r}, expected letters, digits and _, not beginning with a digit"
        )
    if value is not None and "\0" in value:
        raise ConfigurationError(f"{option}.{name} has a null character, expected none")
