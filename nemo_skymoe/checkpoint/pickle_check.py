"""What torch, Megatron and NeMo unpickle of a checkpoint, walked first without building or calling anything.

`.metadata` (by `pickle`), `*.pt` (by `torch.load`), and the byte objects in `*.distcp` (by `torch.load`, whatever they
name), with the pickles inside of these: Transformer Engine's extra states, and storages in their old form.
"""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nemo_skymoe.checkpoint import allowed_classes, inert_pickle
from nemo_skymoe.checkpoint.context_check import check_context
from nemo_skymoe.checkpoint.inert_pickle import NotAllowedError, Record
from nemo_skymoe.checkpoint.reading import are_sizes, member, read_bytes
from nemo_skymoe.checkpoint.torch_dist_storage import CONFIG, METADATA, WEIGHTS, check_backend, read_metadata
from nemo_skymoe.config import ConfigurationError

_ZIP = b"PK\x03\x04"
_TORCH_FILES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle")
_BESIDE_DATA = ("byteorder", "version", ".format_version", ".storage_alignment", ".data/serialization_id")
_EXTRA_STATE, _REBUILD, _ENCODE = "_extra_state", "torch._utils._rebuild_tensor", "_codecs.encode"
_HOLDS_TORCH_FILE = ("torch.storage._load_from_bytes", "_io.BytesIO", "io.BytesIO")
_LARGEST = 1 << 32
_LEGACY_PICKLES = 5
"""Magic number, version, system, the object, and the names of its storages."""
_DEEPEST = 4
"""Pickles within pickles."""


def check_checkpoint(folder: Path) -> None:
    """Refuse a checkpoint's folder, with its `context/` and the adapters' base model, that names anything else.

    Args:
        folder: Of NeMo, of Megatron-LM, or the `weights/` of NeMo's; one that is not there passes.

    Raises:
        ConfigurationError: A file by its name, and the class that it refers to, or how it is damaged.
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
            check_checkpoint(base if base.is_dir() else base.parent)


def _check_files(folder: Path) -> None:
    for file in sorted(path for path in folder.rglob("*") if not path.is_dir()):
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
        raise ConfigurationError(f"'{metadata}' is damaged: {reason!r}") from None
    for name, path, (offset, length) in places:
        file = member(metadata.parent, path, metadata)
        if not are_sizes((offset, length)) or offset + length > file.stat().st_size:
            raise ConfigurationError(
                f"'{file}' is truncated: '{metadata}' has {length!r} bytes at {offset!r}"
            )
        check_torch_file(read_bytes(file, offset, length), file, extra_state=_EXTRA_STATE in str(name))


def check_torch_file(data: bytes, file: Path, *, extra_state: bool = False, depth: int = 0) -> None:
    """Refuse what `torch.save` has written if it names anything outside the list.

    Args:
        data: The file, or the part of one.
        file: Where it is from, for messages.
        extra_state: Its tensors are extra states, whose bytes Transformer Engine unpickles.
        depth: How many others it is in.

    Raises:
        ConfigurationError: The class, or how the data are damaged.
    """
    if depth > _DEEPEST:
        raise ConfigurationError(f"'{file}' is damaged: {depth} pickles within each other")
    # torch decides by the same four bytes.
    if not data.startswith(_ZIP):
        if extra_state and not depth:
            raise ConfigurationError(
                f"'{file}' is not what torch.save writes: an extra state outside an archive"
            )
        for pickled in _of_legacy(data, file):
            _check_object(pickled, file, depth)
        return
    pickled, storages = _of_archive(data, file)
    described = _load(pickled, file)
    _check_object(described, file, depth)
    if extra_state or _EXTRA_STATE.encode() in pickled:
        _check_whole_storages(described, file)
        for storage in filter(None, storages):
            _check_object(_load(storage, file), file, depth)


def read_torch_file(file: Path) -> Any:
    """What `torch.save` has written, as plain values and `Record`s, after `check_torch_file`.

    Raises:
        ConfigurationError: As there; or the file is missing.
    """
    data = read_bytes(file, 0, _size(file))
    check_torch_file(data, file)
    return _load(_of_archive(data, file)[0] if data.startswith(_ZIP) else data, file)


def _of_archive(data: bytes, file: Path) -> tuple[bytes, list[bytes]]:
    """Pickle and storages of an archive, whose directory has to leave torch and this no room for two readings."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = archive.infolist()
            root = entries[0].filename.partition("/")[0]
            names = [entry.filename.removeprefix(f"{root}/") for entry in entries]
            if archive.comment or min(entry.header_offset for entry in entries) != 0:
                raise ValueError("bytes before or behind it")
            if len({entry.filename.lower() for entry in entries}) != len(entries):
                raise ValueError("two entries of one name")
            for entry, name in zip(entries, names, strict=True):
                if entry.filename == name or not (name in ("data.pkl", *_BESIDE_DATA) or _is_storage(name)):
                    raise ValueError(f"an entry '{entry.filename}'")
                if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
                    raise ValueError(f"a compressed '{entry.filename}'")
            contents = {name: archive.read(entry) for name, entry in zip(names, entries, strict=True)}
            return contents["data.pkl"], [value for name, value in contents.items() if _is_storage(name)]
    except (
        zipfile.BadZipFile,
        NotImplementedError,
        RuntimeError,
        ValueError,
        LookupError,
        EOFError,
    ) as reason:
        raise ConfigurationError(f"'{file}' is not what torch.save writes: {reason}") from None


def _is_storage(name: str) -> bool:
    return name.startswith("data/") and name.removeprefix("data/").isdigit()


def _of_legacy(data: bytes, file: Path) -> Iterator[Any]:
    """The pickles of torch's form without an archive, before the numbers."""
    if tarfile.is_tarfile(io.BytesIO(data)):
        raise ConfigurationError(f"'{file}' is a tar archive, expected what torch.save writes")
    stream = io.BytesIO(data)
    for _ in range(_LEGACY_PICKLES):
        yield _load(stream, file)
        if stream.tell() == len(data):
            return


def _load(data: bytes | io.BytesIO, file: Path) -> Any:
    stream = io.BytesIO(data) if isinstance(data, bytes) else data
    try:
        return inert_pickle.load_next(stream, _Allowed(), file, persistent=lambda identifier: identifier)
    except NotAllowedError as reason:
        raise ConfigurationError(f"{reason}; {allowed_classes.advice(reason.name)}") from None


class _Allowed:
    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and allowed_classes.may_be_pickled(name)


def _check_object(pickled: Any, file: Path, depth: int) -> None:
    """The bytes in an object that torch unpickles in their turn when it is built."""
    for record in _records(pickled):
        if record.kind in _HOLDS_TORCH_FILE:
            state = record.state[:1] if isinstance(record.state, tuple) else ()
            for data in filter(None, (_bytes(value, file) for value in (*record.arguments[:1], *state))):
                check_torch_file(data, file, depth=depth + 1)
        elif record.kind == _ENCODE:
            _bytes(record, file)


def _check_whole_storages(pickled: Any, file: Path) -> None:
    """The bytes that Transformer Engine unpickles are the tensor's: they have to be those of its storage."""
    for record in _records(pickled):
        if record.kind.startswith(_REBUILD) and (
            record.arguments[1] != 0 or record.arguments[3] not in ((), (1,))
        ):
            raise ConfigurationError(f"'{file}' is damaged: an extra state that is a part of its storage")


def _bytes(value: Any, file: Path) -> bytes:
    if isinstance(value, Record) and value.kind == _ENCODE and value.arguments[1:] == ("latin1",):
        value = value.arguments[0].encode("latin1") if isinstance(value.arguments[0], str) else None
    if not isinstance(value, bytes):
        raise ConfigurationError(f"'{file}' is damaged: {type(value).__name__} where bytes were expected")
    return value


def _records(value: Any) -> Iterator[Record]:
    """Every call in an object, each once, however it is nested."""
    waiting, seen = [value], set()
    while waiting:
        one = waiting.pop()
        if not isinstance(one, list | tuple | set | frozenset | dict | Record) or id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, Record):
            yield one
            waiting += [one.arguments, one.state, one.contents]
        elif isinstance(one, dict):
            waiting += [*one.keys(), *one.values()]
        else:
            waiting += one


def _base_of_adapters(folder: Path) -> Path | None:
    file = folder / "adapter_metadata.json"
    if not file.is_file():
        return None
    try:
        path = json.loads(read_bytes(file, 0, _size(file)))["model_ckpt_path"]
    except (ValueError, KeyError, TypeError, RecursionError) as reason:
        raise ConfigurationError(f"'{file}' is damaged: {reason!r}") from None
    if not isinstance(path, str):
        raise ConfigurationError(f"'{file}' has the model_ckpt_path {path!r}, expected a path")
    return Path(path)


def _size(file: Path) -> int:
    try:
        size = file.stat().st_size
    except OSError as reason:
        raise ConfigurationError(f"'{file}' cannot be read: {reason.strerror}") from None
    if size > _LARGEST:
        raise ConfigurationError(f"'{file}' is {size:,} bytes, expected at most {_LARGEST:,}")
    return size
