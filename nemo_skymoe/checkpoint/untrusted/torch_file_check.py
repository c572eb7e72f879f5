"""A file that `torch.save` has written is walked before torch loads it: its pickle, and the pickles inside of that one.

Inside are Transformer Engine's extra states, storages in their old form, and files in the memory of a `BytesIO`. A
call is looked at when the pickle makes it, since torch runs it there, whatever becomes of its result.
"""

from __future__ import annotations

import functools
import io
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nemo_skymoe.checkpoint.untrusted import allowed_classes, inert_pickle
from nemo_skymoe.checkpoint.untrusted.inert_pickle import NotAllowedError, Record
from nemo_skymoe.durable.errors import CheckpointError

EXTRA_STATE = "_extra_state"
_ZIP = b"PK\x03\x04"
_BYTE_ORDER = "byteorder"
_BESIDE_DATA = (_BYTE_ORDER, "version", ".format_version", ".storage_alignment", ".data/serialization_id")
_REBUILD, _PARAMETER, _ENCODE = "torch._utils._rebuild_", "torch.nn.parameter.Parameter", "_codecs.encode"
_TEXT = ("builtins.str", "__builtin__.str")
_SCALAR = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
_HOLDS_TORCH_FILE = (
    "torch.storage._load_from_bytes",
    "megatron.core.safe_globals.safe_load_from_bytes",
    "_io.BytesIO",
    "io.BytesIO",
)
_LEGACY_PICKLES = 5
"""Magic number, version, system, the object, and the names of its storages."""
_DEEPEST = 4
"""Pickles within pickles."""


def check_torch_file(data: bytes, file: Path, *, extra_state: bool = False, depth: int = 0) -> None:
    """Refuse what `torch.save` has written if it names anything outside the list.

    Args:
        data: The file, or the part of one.
        file: The file it is from, for messages.
        extra_state: Its tensors are extra states, whose bytes Transformer Engine unpickles.
        depth: How many others it is in.

    Raises:
        CheckpointError: The class, or how the data are damaged.
    """
    if depth > _DEEPEST:
        raise CheckpointError(f"'{file}' is damaged: {depth} pickles within each other")
    # torch decides by the same four bytes.
    if not data.startswith(_ZIP):
        if any(map(_holds_extra_state, _of_legacy(data, file, depth))) or (extra_state and not depth):
            raise CheckpointError(
                f"'{file}' is not what torch.save writes: an extra state outside an archive"
            )
        return
    pickled, storages = _of_archive(data, file)
    described = _load(pickled, file, depth)
    if extra_state or _holds_extra_state(described):
        _check_whole_storages(described, file)
        for storage in filter(None, storages):
            _load(storage, file, depth)


def read_object(data: bytes, file: Path) -> Any:
    """Return the object in what `torch.save` has written, as plain values and `Record`s, after `check_torch_file`.

    Raises:
        CheckpointError: As there.
    """
    check_torch_file(data, file)
    return _load(_of_archive(data, file)[0] if data.startswith(_ZIP) else data, file)


def check_call(record: Record, file: Path, depth: int = 0) -> None:
    """Refuse a call in a pickle by what it would do, and walk the bytes that torch unpickles in their turn.

    Args:
        record: The object that is made, or that has just got a state.
        file: The file it is from, for messages.
        depth: How many pickles it is in.

    Raises:
        CheckpointError: The class that an inner pickle refers to, or how this one is damaged.
    """
    if record.kind in _HOLDS_TORCH_FILE:
        state = record.state[:1] if isinstance(record.state, tuple) else ()
        for data in filter(None, (_bytes(value, file) for value in (*record.arguments[:1], *state))):
            check_torch_file(data, file, depth=depth + 1)
    elif record.kind == _ENCODE:
        _bytes(record, file)
    elif record.kind.startswith(_REBUILD) or record.kind == _PARAMETER:
        # A tensor takes another storage from its state.
        if record.state is not None:
            raise CheckpointError(f"'{file}' is damaged: a tensor with a state")
    elif (record.kind in _TEXT and record.arguments) or (
        record.kind in _SCALAR and not _is_number(record.arguments[:1])
    ):
        # An extra state is found by its name, which therefore has to stand in the file.
        raise CheckpointError(f"'{file}' is damaged: text that is the result of a call")


def _is_number(arguments: tuple[Any, ...]) -> bool:
    """Say whether these bytes begin with a data type of numpy's that is not text."""
    kind = arguments[0] if arguments else None
    if isinstance(kind, Record) and kind.kind == "numpy.dtype":
        kind = kind.arguments[0] if kind.arguments else None
    if isinstance(kind, Record):
        return kind.kind.startswith("numpy.dtypes.")
    return isinstance(kind, str) and kind.lstrip("<>=|")[:1] in (
        "b",
        "i",
        "u",
        "f",
        "c",
        "?",
        "O",
        "m",
        "M",
        "V",
    )


def _of_archive(data: bytes, file: Path) -> tuple[bytes, list[bytes]]:
    """Return pickle and storages of an archive. Its directory must not have two readings."""
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
            # torch turns the bytes of storages round where this says so.
            if contents.get(_BYTE_ORDER, b"little") != b"little":
                raise ValueError("a byte order other than little")
            return contents["data.pkl"], [value for name, value in contents.items() if _is_storage(name)]
    except (
        zipfile.BadZipFile,
        NotImplementedError,
        RuntimeError,
        ValueError,
        LookupError,
        EOFError,
    ) as reason:
        raise CheckpointError(f"'{file}' is not what torch.save writes: {reason}") from None


def _is_storage(name: str) -> bool:
    return name.startswith("data/") and name.removeprefix("data/").isdigit()


def _of_legacy(data: bytes, file: Path, depth: int) -> Iterator[Any]:
    """Yield the pickles of torch's form without an archive, before the numbers."""
    if tarfile.is_tarfile(io.BytesIO(data)):
        raise CheckpointError(f"'{file}' is a tar archive, expected what torch.save writes")
    stream = io.BytesIO(data)
    for _ in range(_LEGACY_PICKLES):
        yield _load(stream, file, depth)
        if stream.tell() == len(data):
            return


def _load(data: bytes | io.BytesIO, file: Path, depth: int = 0) -> Any:
    stream = io.BytesIO(data) if isinstance(data, bytes) else data
    called = functools.partial(check_call, file=file, depth=depth)
    try:
        return inert_pickle.load_next(
            stream, _Allowed(), file, persistent=lambda identifier: identifier, called=called
        )
    except NotAllowedError as reason:
        raise CheckpointError(f"{reason}; {allowed_classes.advice(reason.name)}") from None


class _Allowed:
    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and allowed_classes.may_be_pickled(name)


def _holds_extra_state(described: Any) -> bool:
    return any(isinstance(part, str) and EXTRA_STATE in part for part in _parts(described))


def _check_whole_storages(described: Any, file: Path) -> None:
    """Check that the bytes that Transformer Engine unpickles of a tensor are all bytes of its storage."""
    for record in _parts(described):
        if not isinstance(record, Record) or not record.kind.startswith(f"{_REBUILD}tensor"):
            continue
        if record.arguments[1] != 0 or record.arguments[3] not in ((), (1,)):
            raise CheckpointError(f"'{file}' is damaged: an extra state that is a part of its storage")
        # Bits that torch keeps beside a tensor's numbers, such as that all of them are negative.
        if record.kind == f"{_REBUILD}tensor_v2" and any(record.arguments[6:]):
            raise CheckpointError(f"'{file}' is damaged: an extra state with metadata")


def _bytes(value: Any, file: Path) -> bytes:
    if isinstance(value, Record) and value.kind == _ENCODE and value.arguments[1:] == ("latin1",):
        value = value.arguments[0].encode("latin1") if isinstance(value.arguments[0], str) else None
    if not isinstance(value, bytes):
        raise CheckpointError(f"'{file}' is damaged: {type(value).__name__} where bytes were expected")
    return value


def _parts(value: Any) -> Iterator[Any]:
    """Yield every value and call in an object, however they are nested; a container once."""
    waiting, seen = [value], set[int]()
    while waiting:
        one = waiting.pop()
        if not isinstance(one, list | tuple | set | frozenset | dict | Record):
            yield one
        elif id(one) not in seen:
            seen.add(id(one))
            if isinstance(one, Record):
                yield one
                waiting += [one.arguments, one.state, one.contents]
            elif isinstance(one, dict):
                waiting += [*one.keys(), *one.values()]
            else:
                waiting += one
