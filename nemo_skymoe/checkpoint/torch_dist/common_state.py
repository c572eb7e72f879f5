"""What a `torch_dist` checkpoint has beside tensors, read without running anything that a file says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemo_skymoe.checkpoint.torch_dist.pickle_check import read_torch_file
from nemo_skymoe.checkpoint.torch_dist.storage import METADATA, read_metadata, weights_folder
from nemo_skymoe.checkpoint.untrusted.torch_file_check import read_object
from nemo_skymoe.durable.errors import CheckpointError
from nemo_skymoe.durable.reading import are_sizes, member, read_bytes

_FILE, _OBJECT = "common.pt", "common_state/"
_LARGEST = 1 << 30


def read_common_state(checkpoint: Path) -> dict[str, Any]:
    """Return the part of a checkpoint that Megatron saves once for all ranks, as plain values and `Record`s.

    Older Megatron-Cores write it to `common.pt`, newer ones (0.19) as an object into the tensors' files.

    Args:
        checkpoint: A checkpoint of NeMo or Megatron-LM, or an iteration of Megatron-Bridge.

    Raises:
        CheckpointError: There is none, or it is damaged, or it refers to a class that is not allowed.
    """
    folder = weights_folder(checkpoint)
    found = read_torch_file(folder / _FILE) if (folder / _FILE).is_file() else _object_in(folder)
    if not isinstance(found, dict):
        raise CheckpointError(f"'{folder}' has a common state of {type(found).__name__}, expected a dict")
    return found


def _object_in(folder: Path) -> Any:
    metadata = folder / METADATA
    try:
        stored = read_metadata(metadata).field("storage_data")
        places = [
            (info.field("relative_path"), info.field("offset"), info.field("length"))
            for index, info in stored.items()
            if index.field("fqn").startswith(_OBJECT)
        ]
    except (AttributeError, TypeError, ValueError) as reason:
        raise CheckpointError(f"'{metadata}' is damaged: {reason!r}") from None
    if len(places) != 1:
        raise CheckpointError(
            f"'{folder}' has neither {_FILE} nor one common state among its tensors, of which it has {len(places)}"
        )
    path, offset, length = places[0]
    file = member(folder, path, metadata)
    if not are_sizes((offset, length)) or length > _LARGEST or offset + length > file.stat().st_size:
        raise CheckpointError(f"'{file}' is truncated: '{metadata}' has {length!r} bytes at {offset!r}")
    found = read_object(read_bytes(file, offset, length), file)
    # Megatron saves every object of a checkpoint in a list, one for each place of a grid.
    return found[0] if isinstance(found, list) and len(found) == 1 else found
