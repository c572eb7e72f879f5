"""The output of a job grows in a folder of another name, which is renamed when everything in it is complete."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nemo_skymoe.durable.errors import ConfigurationError, JobError
from nemo_skymoe.durable.files import sync
from nemo_skymoe.durable.journal import JOURNAL, Journal

UNFINISHED = ".unfinished"


def absolute(output: Path) -> Path:
    """Return the same place for every path that leads to it. The last name is not followed if it is a link."""
    whole = Path(os.path.realpath(output))
    return whole if output.name in ("", "..") else Path(os.path.realpath(output.parent)) / output.name


def _more_than_a_journal(folder: Path) -> bool:
    return set(os.listdir(folder)) != {JOURNAL}


@contextmanager
def unfinished(
    output: Path, identity: Mapping[str, Any], keep: Callable[[Path], bool] = _more_than_a_journal
) -> Iterator[Journal]:
    """Yield the journal of the job that makes `output`, locked in `<output>.unfinished`. `publish` ends the job.

    If anything ends it earlier, the folder stays, and the same job continues in it.

    Args:
        output: The output, as `absolute` returns it.
        identity: The values that make two jobs the same: see `Journal`.
        keep: Says whether a folder holds something to continue from. If it does not, a refusal removes the folder.

    Raises:
        JobError: The operating system refuses something, another process is at work, or the folder is another job's.
    """
    folder = output.with_name(output.name + UNFINISHED)
    with plain_errors(folder):
        journal = Journal(folder, identity)
        try:
            yield journal
        except ConfigurationError:
            if not keep(folder):
                shutil.rmtree(folder)
            raise
        finally:
            journal.close()


def publish(journal: Journal, output: Path) -> None:
    """Give the folder of a job its name, when everything in it is complete and synced."""
    journal.remove()
    sync(journal.folder)
    os.rename(journal.folder, output)
    sync(output.parent)


@contextmanager
def plain_errors(folder: Path) -> Iterator[None]:
    """Say in a sentence what the operating system refuses to do in `folder`."""
    try:
        yield
    except OSError as reason:
        place = reason.filename or folder
        if reason.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            message = f"no space left for '{place}' ({reason.strerror}): make room"
        else:
            message = f"cannot write '{place}': {reason.strerror or reason}; change that"
        raise JobError(f"{message}, then run the same command again to continue") from reason


def check_space(folder: Path, needed: int, what: str = "") -> None:
    """Refuse to begin a job that cannot end: `what` needs `needed` bytes, and the disk has fewer."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise JobError(
            f"'{folder}' needs {needed / 1e9:.3f} GB{what}, its disk has {free / 1e9:.3f} GB free: make room, then run"
            " the same command again"
        )
