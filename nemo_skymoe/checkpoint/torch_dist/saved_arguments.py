"""The command-line arguments that Megatron-LM saves, read without running anything that the files say.

They are in `common.pt`, and from megatron-core 0.19 in an object among the tensors, which `.metadata` names.
"""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

from nemo_skymoe.checkpoint.torch_dist.storage import METADATA, read_metadata
from nemo_skymoe.checkpoint.untrusted import inert_pickle
from nemo_skymoe.checkpoint.untrusted.inert_pickle import Record
from nemo_skymoe.durable.errors import CheckpointError
from nemo_skymoe.durable.reading import are_sizes, member, read_bytes

LARGEST = 64 * 2**20
"""Bytes; Megatron-LM's arguments take some 20 kB."""


_COMMON, _OBJECT = "common.pt", "common_state/"


def file_of(weights: Path) -> Path:
    """Return the file that says where the arguments are: `common.pt`, or `.metadata` if that is not there."""
    common = weights / _COMMON
    return common if common.is_file() or _object(weights / METADATA) is None else weights / METADATA


def read(file: Path) -> dict[str, Any]:
    """Return the arguments by name. Values that are not plain, or containers of plain ones, are `Record` or `Global`.

    Args:
        file: What `file_of` returns.

    Raises:
        CheckpointError: The file is missing or damaged, or holds no arguments.
    """
    try:
        data = _bytes_of_object(file) if file.name == METADATA else file.read_bytes()
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            (entry,) = (info for info in archive.infolist() if info.filename.endswith("/data.pkl"))
            if entry.file_size > LARGEST:
                raise ValueError(f"a pickle of {entry.file_size:,} bytes")
            data = archive.read(entry)
    except OSError as reason:
        raise CheckpointError(f"'{file}' cannot be read: {reason.strerror or reason}") from reason
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError) as reason:
        raise CheckpointError(f"'{file}' is not what torch.save writes: {reason}") from reason
    content = inert_pickle.load(data, _Any(), file, persistent=lambda _: None)
    if isinstance(content, list) and len(content) == 1:  # an object among the tensors is in a list
        (content,) = content
    arguments = content.get("args") if isinstance(content, dict) else None
    if not isinstance(arguments, Record) or not isinstance(arguments.state, dict):
        raise CheckpointError(f"'{file}' holds no arguments of Megatron-LM")
    return arguments.state


def _object(metadata: Path) -> Record | None:
    """Return the place of the object that the arguments are in; None if there is none."""
    try:
        stored = read_metadata(metadata).field("storage_data").items()
        found = [place for index, place in stored if str(index.field("fqn")).startswith(_OBJECT)]
    except (AttributeError, TypeError, ValueError) as reason:
        raise CheckpointError(f"'{metadata}' is damaged: {reason!r}") from None
    return found[0] if found else None


def _bytes_of_object(metadata: Path) -> bytes:
    place = _object(metadata)
    if place is None:
        raise CheckpointError(f"'{metadata}' names no {_OBJECT}, which has the arguments of Megatron-LM")
    offset, length = place.field("offset"), place.field("length")
    if not are_sizes((offset, length)) or length > LARGEST:
        raise CheckpointError(f"'{metadata}' has {length!r} bytes of {_OBJECT} at {offset!r}")
    return read_bytes(member(metadata.parent, place.field("relative_path"), metadata), offset, length)


class _Any:
    """Every class: Megatron-LM's arguments have some of its own among them, and none is built."""

    def __contains__(self, name: object) -> bool:
        return True
