"""The command-line arguments that Megatron-LM saves in `common.pt`, read without running anything that the file says."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

from nemo_skymoe.checkpoint.untrusted import inert_pickle
from nemo_skymoe.checkpoint.untrusted.inert_pickle import Record
from nemo_skymoe.durable.errors import CheckpointError

LARGEST = 64 * 2**20
"""Bytes; Megatron-LM's arguments take some 20 kB."""


def read(file: Path) -> dict[str, Any]:
    """Return the arguments by name. Values that are not plain, or containers of plain ones, are `Record` or `Global`.

    Raises:
        CheckpointError: The file is missing or damaged, or holds no arguments.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            (entry,) = (info for info in archive.infolist() if info.filename.endswith("/data.pkl"))
            if entry.file_size > LARGEST:
                raise ValueError(f"a pickle of {entry.file_size:,} bytes")
            data = archive.read(entry)
    except OSError as reason:
        raise CheckpointError(f"'{file}' cannot be read: {reason.strerror or reason}") from reason
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError) as reason:
        raise CheckpointError(f"'{file}' is not what torch.save writes: {reason}") from reason
    content = inert_pickle.load(data, _Any(), file, persistent=lambda _: None)
    arguments = content.get("args") if isinstance(content, dict) else None
    if not isinstance(arguments, Record) or not isinstance(arguments.state, dict):
        raise CheckpointError(f"'{file}' holds no arguments of Megatron-LM")
    return arguments.state


class _Any:
    """Every class: Megatron-LM's arguments have some of its own among them, and none is built."""

    def __contains__(self, name: object) -> bool:
        return True
