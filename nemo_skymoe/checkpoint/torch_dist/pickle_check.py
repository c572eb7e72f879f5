"""Scan everything that torch, Megatron and NeMo unpickle of a checkpoint, without building or calling anything.

`.metadata` (by `pickle`), `*.pt` (by `torch.load`), and the byte objects in `*.distcp` (by `torch.load`, whatever they
name), with the pickles inside of these, and the context that NeMo builds.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nemo_skymoe.checkpoint.torch_dist.storage import CONFIG, METADATA, WEIGHTS, check_backend, read_metadata
from nemo_skymoe.checkpoint.untrusted.context_check import CONTEXT, check_context
from nemo_skymoe.checkpoint.untrusted.torch_file_check import EXTRA_STATE, check_torch_file, read_object
from nemo_skymoe.durable.errors import CheckpointError
from nemo_skymoe.durable.reading import are_sizes, member, read_bytes
from nemo_skymoe.folders import every_file

_TORCH_FILES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle")
_LARGEST = 1 << 32
_MOST_FILES = 100_000
_MOST_BASES = 8
"""Adapters of adapters; NeMo itself follows one."""


def check_checkpoint(folder: Path, bases: int = _MOST_BASES) -> None:
    """Refuse a checkpoint's folder, with its `context/` and the adapters' base model, that names anything else.

    Args:
        folder: A checkpoint of NeMo or of Megatron-LM, or the `weights/` of NeMo's; one that is not there passes.
        bases: How many base models may follow each other.

    Raises:
        CheckpointError: A file by its name, and the class that it refers to, or how it is damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return
    root = folder.parent if folder.name == WEIGHTS else folder
    for context in {root / "context", root, folder}:
        check_context(context)
    for place in {root / WEIGHTS, folder} if (root / WEIGHTS).is_dir() else {folder}:
        _check_files(place)
        base = _base_of_adapters(place)
        if base is not None and base.resolve() != root.resolve():
            if not bases:
                raise CheckpointError(f"'{place}' has adapters whose base models lead in a circle")
            check_checkpoint(base if base.is_dir() else base.parent, bases - 1)


def check_loaded(path: Path) -> None:
    """Refuse what NeMo is about to load a context from, by what the context names and the weights beside it hold.

    Args:
        path: A context's folder, its `io.json`, or the folder of a checkpoint without one.

    Raises:
        CheckpointError: As `check_context` and `check_checkpoint`.
    """
    folder = path if path.is_dir() else path.parent
    check_context(folder)
    if folder.name == CONTEXT:
        check_checkpoint(folder.parent)


def read_torch_file(file: Path) -> Any:
    """Return the content of a file of `torch.save`, as plain values and `Record`s, after `check_torch_file`.

    Raises:
        CheckpointError: As there; or the file is missing.
    """
    return read_object(read_bytes(file, 0, _size(file)), file)


def _check_files(folder: Path) -> None:
    # Through links to folders too, as Megatron reads.
    for count, file in enumerate(every_file(folder), start=1):
        if count > _MOST_FILES:
            raise CheckpointError(f"'{folder}' holds more than {_MOST_FILES:,} files, expected a checkpoint")
        if file.name.endswith(METADATA):
            _check_byte_objects(file)
        elif file.suffix in _TORCH_FILES:
            check_torch_file(read_bytes(file, 0, _size(file)), file)
        elif file.name == CONFIG:
            check_backend(file)


def _check_byte_objects(metadata: Path) -> None:
    described = read_metadata(metadata)
    try:
        entries, stored = described.field("state_dict_metadata"), described.field("storage_data")
        objects = {name for name, entry in entries.items() if entry.kind.endswith(".BytesStorageMetadata")}
        held = [
            (index.field("fqn"), info)
            for index, info in stored.items()
            if index.field("fqn") in objects or index.field("offset") is None
        ]
        # Their classes have no arguments in what is saved: only the state counts.
        if any(record.arguments for pair in stored.items() for record in pair) or described.arguments:
            raise ValueError("a place with arguments")
        if any(info.field("transform_descriptors") for _, info in held):
            raise ValueError("a compressed object")
        places = [
            (name, info.field("relative_path"), (info.field("offset"), info.field("length")))
            for name, info in held
        ]
    except (AttributeError, TypeError, ValueError) as reason:
        raise CheckpointError(f"'{metadata}' is damaged: {reason!r}") from None
    for name, path, (offset, length) in places:
        file = member(metadata.parent, path, metadata)
        if not are_sizes((offset, length)) or offset + length > file.stat().st_size:
            raise CheckpointError(f"'{file}' is truncated: '{metadata}' has {length!r} bytes at {offset!r}")
        check_torch_file(read_bytes(file, offset, length), file, extra_state=EXTRA_STATE in str(name))


def _base_of_adapters(folder: Path) -> Path | None:
    file = folder / "adapter_metadata.json"
    if not file.is_file():
        return None
    try:
        path = json.loads(read_bytes(file, 0, _size(file)))["model_ckpt_path"]
    except (ValueError, KeyError, TypeError, RecursionError) as reason:
        raise CheckpointError(f"'{file}' is damaged: {reason!r}") from None
    if not isinstance(path, str):
        raise CheckpointError(f"'{file}' has the model_ckpt_path {path!r}, expected a path")
    return Path(path)


def _size(file: Path) -> int:
    try:
        size = file.stat().st_size
    except OSError as reason:
        raise CheckpointError(f"'{file}' cannot be read: {reason.strerror}") from None
    if size > _LARGEST:
        raise CheckpointError(f"'{file}' is {size:,} bytes, expected at most {_LARGEST:,}")
    return size
