"""The place of the elements of tensors that `torch.save` wrote into a file, or into the middle of one."""

from __future__ import annotations

import io
import os
import zipfile
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from nemo_skymoe.checkpoint.tensors.regions import DTYPE_SIZES
from nemo_skymoe.checkpoint.untrusted import inert_pickle
from nemo_skymoe.checkpoint.untrusted.inert_pickle import Global, Record
from nemo_skymoe.durable.errors import CheckpointError
from nemo_skymoe.durable.reading import are_sizes, read_bytes

ARCHIVE = b"PK\x03\x04"
"""The first bytes of an archive, the form in which `torch.save` writes since torch 1.6."""
_STORAGES = {
    "torch.BFloat16Storage": "bfloat16",
    "torch.HalfStorage": "float16",
    "torch.FloatStorage": "float32",
    "torch.DoubleStorage": "float64",
    "torch.LongStorage": "int64",
    "torch.IntStorage": "int32",
    "torch.ShortStorage": "int16",
    "torch.CharStorage": "int8",
    "torch.ByteStorage": "uint8",
    "torch.BoolStorage": "bool",
    "torch.ComplexFloatStorage": "complex64",
    "torch.storage.UntypedStorage": "uint8",
}
_REBUILD = "torch._utils._rebuild_tensor_v2"
_REBUILD_TYPED = "torch._utils._rebuild_tensor_v3"
_PARAMETER = "torch._utils._rebuild_parameter"
_DICTIONARY = "collections.OrderedDict"
_ALLOWED = {*_STORAGES, _REBUILD, _REBUILD_TYPED, _PARAMETER, _DICTIONARY} | {
    f"torch.{dtype}" for dtype in DTYPE_SIZES
}
_LONGEST_TENSOR, _LONGEST_MODEL = 1 << 20, 1 << 27
"""Bytes of the directory of an archive with one tensor, and with those of a model; what a damaged one claims beyond it
is not read."""


@dataclass(frozen=True)
class SavedTensor:
    """Contiguous elements of `dtype` from byte `start` of the file on."""

    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def stop(self) -> int:
        """The byte after the last element."""
        return self.start + prod(self.shape) * DTYPE_SIZES[self.dtype]


def find_tensor(file: Path, offset: int, length: int) -> SavedTensor:
    """Read the directory of the archive at `offset`, and nothing of the tensor itself.

    Raises:
        CheckpointError: There is no such archive, or its tensor is compressed, strided or longer than its data.
    """
    archive = _Archive(file, offset, length, _LONGEST_TENSOR)
    described = archive.described()
    try:
        return archive.place(described)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as reason:
        raise _damaged(file, offset, reason) from None


def find_tensors(file: Path) -> dict[str, SavedTensor]:
    """Return the tensors of a whole file that holds a dictionary of them, by name. Reads its directory alone.

    Two names may stand for one tensor, as those of tied weights do.

    Raises:
        CheckpointError: The file is no archive, refers to anything but tensors, or holds anything else.
    """
    archive = _Archive(file, 0, file.stat().st_size, _LONGEST_MODEL)
    described = archive.described()
    if isinstance(described, Record) and described.kind == _DICTIONARY:
        described = dict(zip(described.contents[::2], described.contents[1::2], strict=True))
    if not isinstance(described, dict) or not all(isinstance(name, str) for name in described):
        raise CheckpointError(
            f"'{file}' holds no dictionary of tensors by name, expected the weights of a model"
        )
    found: dict[str, SavedTensor] = {}
    for name, value in described.items():
        if isinstance(value, Record) and value.kind == _PARAMETER and value.arguments:
            value = value.arguments[0]
        try:
            found[name] = archive.place(value)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as reason:
            raise CheckpointError(f"'{name}' in '{file}' is no readable tensor: {reason!r}") from None
    return found


class _Archive:
    """What `torch.save` wrote into a part of a file: a description, and where each storage is."""

    def __init__(self, file: Path, offset: int, length: int, longest: int):
        self._file, self._offset, self._length = file, offset, length
        try:
            with zipfile.ZipFile(_Slice(file, offset, length, longest)) as archive:
                entries = archive.infolist()
                self._entries = {info.filename.partition("/")[2]: info for info in entries}
                if len(self._entries) != len(entries):
                    raise ValueError("two entries of one name")
                if self._entries["data.pkl"].file_size > longest:
                    raise ValueError(f"a description of {self._entries['data.pkl'].file_size:,} bytes")
                self._pickled = archive.read(self._entries["data.pkl"])
                if "byteorder" in self._entries and archive.read(self._entries["byteorder"]) != b"little":
                    raise ValueError("not little-endian")
        except (
            zipfile.BadZipFile,
            ValueError,
            KeyError,
            OSError,
            NotImplementedError,
            RuntimeError,
            EOFError,
        ) as reason:
            raise _damaged(file, offset, reason) from None

    def described(self) -> Any:
        """Return the values that the archive's pickle describes, as plain values and `Record`s."""
        return inert_pickle.load(
            self._pickled, _ALLOWED, self._file, persistent=lambda identifier: identifier
        )

    def place(self, described: Any) -> SavedTensor:
        """Return the place of a tensor. Raises ValueError and the like for what is none, or does not fit its storage."""
        dtype, shape, key, first = _parse(described)
        start, size = self._data(self._entries[f"data/{key}"])
        found = SavedTensor(dtype, shape, start + first * DTYPE_SIZES[dtype])
        if found.stop > start + size:
            raise ValueError("fewer elements than its shape has")
        return found

    def _data(self, entry: zipfile.ZipInfo) -> tuple[int, int]:
        """Return first byte and size of an uncompressed member."""
        local = entry.header_offset
        if entry.compress_type != zipfile.ZIP_STORED or not 0 <= local <= self._length - 30:
            raise ValueError(f"'{entry.filename}' is compressed or outside the archive")
        header = read_bytes(self._file, self._offset + local, 30)
        if header[:4] != ARCHIVE:
            raise ValueError(f"no member at {local:,}")
        start = local + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        if start + entry.file_size > self._length:
            raise ValueError(f"'{entry.filename}' is longer than the archive")
        return self._offset + start, entry.file_size


def _damaged(file: Path, offset: int, reason: Exception) -> CheckpointError:
    return CheckpointError(f"'{file}' holds no readable tensor at byte {offset:,}: {reason!r}")


def _parse(described: Any) -> tuple[str, tuple[int, ...], str, int]:
    """Return data type, shape, storage's name and first element in it, from the pickle that describes a tensor."""
    if not isinstance(described, Record) or described.kind not in (_REBUILD, _REBUILD_TYPED):
        raise ValueError("not a tensor")
    (tag, storage, key, _, _), first, shape, strides = described.arguments[:4]
    if tag != "storage" or not isinstance(storage, Global) or not isinstance(key, str):
        raise ValueError("no storage")
    dtype = _STORAGES[storage.name]
    if described.kind == _REBUILD_TYPED:
        dtype = described.arguments[6].name.removeprefix("torch.")
    if not are_sizes(shape) or not are_sizes((first,)) or len(strides) != len(shape):
        raise ValueError(f"shape {shape!r}")
    contiguous = [prod(shape[axis + 1 :]) for axis in range(len(shape))]
    if any(
        size > 1 and stride != dense for size, stride, dense in zip(shape, strides, contiguous, strict=True)
    ):
        raise ValueError(f"strides {strides!r} of shape {shape!r}, expected contiguous elements")
    if dtype not in DTYPE_SIZES:
        raise ValueError(f"data type {dtype}")
    return dtype, tuple(shape), key, first


class _Slice(io.RawIOBase):
    """Part of a file as a file, for small reads."""

    def __init__(self, file: Path, offset: int, length: int, longest: int):
        self._file, self._offset, self._length, self._longest = file, offset, length, longest
        self._position = 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        if base + offset < 0:
            raise ValueError("a position before the archive")
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        rest = max(0, self._length - self._position)
        size = rest if size is None or size < 0 else min(size, rest)
        if size > self._longest:
            raise ValueError(f"a directory of {size:,} bytes")
        data = read_bytes(self._file, self._offset + self._position, size)
        self._position += size
        return data
