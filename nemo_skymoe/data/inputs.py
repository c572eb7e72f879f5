"""Find, type and check the files of a data preparation before any work. Those left out come with the reason."""

from __future__ import annotations

import glob
import gzip
import io
import json
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.durable.errors import CheckpointError
from nemo_skymoe.folders import LeaveOut, again, file_identity, files_below

FORMATS = {".jsonl": "jsonl", ".json": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".txt": "text"}
"""Format by suffix, after that of a compression. `lines`, with one document per line, has to be asked for."""
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
_KNOWN = f"{', '.join(FORMATS)} (perhaps with {', '.join(COMPRESSIONS)})"
_NAME = re.compile(r"[A-Za-z0-9][\w-]*")
UNKNOWN, NOTHING = "of unknown format", "empty"


@dataclass(frozen=True)
class Input:
    """One file and the domain that its documents belong to."""

    path: Path
    domain: str
    format: str
    """`jsonl`, `parquet`, `text` (the file is one document) or `lines` (every line is one document)."""

    size: int
    """Bytes when the file was found, and `modified`, nanoseconds. A file that changes later counts as another one."""
    modified: int

    @property
    def compressed(self) -> bool:
        """Whether the file has to be read from its beginning."""
        return self.path.suffix.lower() in COMPRESSIONS

    @property
    def unchanged(self) -> bool:
        """Whether the file is still the one that was found."""
        status = self.path.stat()
        return (status.st_size, status.st_mtime_ns) == (self.size, self.modified)


def find_inputs(
    texts: Sequence[str],
    text_key: str,
    formats: Sequence[str] = (),
    leave_out: LeaveOut = lambda path, reason: None,
) -> list[Input]:
    """Read `PATH` or `DOMAIN=PATH` each; a path is a file, a folder of files or a pattern with `*`.

    Args:
        text_key: Key, or column, of a document's text: has to be in the first record of every file.
        formats: `FORMAT` of every file, or `DOMAIN=FORMAT`. Others go by their suffix in either case.
        leave_out: Told of every file that is found and not read, with the reason: it is empty, hidden in a folder, of
            unknown suffix in a folder, or reached a second time by a link.

    Raises:
        ConfigurationError: A path has no files, a file is there twice, a format is unknown, a key or column is missing,
            or all files of a domain are empty.
        CheckpointError: A file cannot be read.
    """
    by_domain = _formats(formats)
    named = [_domain(text) for text in texts]
    for domain in by_domain.keys() - {domain for domain, _ in named} - {""}:
        raise ConfigurationError(f"--format has the domain '{domain}', of which there is no input")
    inputs = [
        found
        for domain, place in named
        for found in _expand(domain, place, by_domain.get(domain, by_domain.get("")), leave_out)
    ]
    seen: dict[object, Path] = {}
    for found in inputs:
        if (first := seen.setdefault(file_identity(found.path), found.path)) is not found.path:
            same = "" if first == found.path else f": it is the same file as '{first}'"
            raise ConfigurationError(f"the file '{found.path}' is given twice{same}")
    kept = [found for found in inputs if _holds_something(found, text_key, leave_out)]
    for domain in dict.fromkeys(found.domain for found in inputs):
        if all(found.domain != domain for found in kept):
            files = [str(found.path) for found in inputs if found.domain == domain]
            raise ConfigurationError(
                f"the domain '{domain}' has no document in {len(files)} files: all are empty ('{files[0]}')"
            )
    return kept


def open_bytes(path: Path) -> BinaryIO:
    """Open a file's bytes, decompressed to the very end: after a compressed stream comes another, or an OSError."""
    compression = COMPRESSIONS.get(path.suffix.lower())
    if compression is None:
        return path.open("rb")
    if compression == "gzip":  # which may be padded with zeros
        return cast(BinaryIO, gzip.open(path))
    import pyarrow

    stream: Any = pyarrow.input_stream(str(path), compression=compression)
    return io.BufferedReader(stream)


def read_errors() -> tuple[type[Exception], ...]:
    """Return the exceptions that reading a damaged file raises, whatever its format and compression."""
    from pyarrow.lib import ArrowException

    return (OSError, EOFError, zlib.error, ArrowException)


def parse_record(line: str) -> Any:
    """Parse a line of JSON.

    Raises:
        ValueError: It is not JSON, or nested too deeply to be read.
    """
    line = line.removeprefix("\ufeff")  # files that each begin with a mark, one after the other
    try:
        return json.loads(line)
    except RecursionError:
        raise ValueError("the JSON is nested too deeply") from None
    except json.JSONDecodeError:
        raise
    except ValueError:  # an integer of more digits than Python converts: only the text counts
        return json.loads(line, parse_int=float)


def _formats(texts: Sequence[str]) -> dict[str, str]:
    """Return the formats by domain; under "" is that of all others."""
    formats: dict[str, str] = {}
    for text in texts:
        domain, _, format = text.rpartition("=")
        if format not in {*FORMATS.values(), "lines"}:
            raise ConfigurationError(
                f"--format is '{text}', expected jsonl, parquet, text or lines, for all or as DOMAIN=FORMAT"
            )
        formats[domain] = format
    return formats


def _domain(text: str) -> tuple[str, str]:
    """Return the domain and the path of an argument."""
    domain, equals, place = text.partition("=")
    if not equals or "/" in domain or Path(text).exists():
        return "text", text
    if not _NAME.fullmatch(domain):
        raise ConfigurationError(f"the domain of '{text}' is '{domain}', expected letters, digits, _ and -")
    return domain, place


def _expand(domain: str, place: str, format: str | None, leave_out: LeaveOut) -> list[Input]:
    path = Path(place)
    if path.is_dir():
        files = _of_folder(path, format, leave_out)
    elif path.is_file():
        files = [path]
    else:
        files = _of_pattern(place, format, leave_out)
    if not files:
        raise ConfigurationError(f"'{place}' is no file, no folder and no pattern that has any to read")
    return [_input(file, domain, format or _known_format(file)) for file in files]


def _of_folder(folder: Path, format: str | None, leave_out: LeaveOut) -> list[Path]:
    files, known = files_below(folder, leave_out, hidden=False), []
    for file in files:
        if format or _format(file):
            known.append(file)
        else:
            leave_out(file, UNKNOWN)
    if files and not known:
        raise ConfigurationError(
            f"none of the {len(files)} files in '{folder}' is of a known format, expected {_KNOWN}, or --format"
        )
    return known


def _of_pattern(pattern: str, format: str | None, leave_out: LeaveOut) -> list[Path]:
    """Return the files that a pattern matches, and those in matching folders, each once. `**` is any folders."""
    found: dict[object, Path] = {}
    for path in _matches(pattern, leave_out):
        for file in _of_folder(path, format, leave_out) if path.is_dir() else [path]:
            if not file.is_file():
                raise CheckpointError(f"'{file}' is no file that can be read")
            first = found.setdefault(file_identity(file), file)
            if first != file:
                leave_out(file, again(first))
    return list(found.values())


def _matches(pattern: str, leave_out: LeaveOut) -> list[Path]:
    before, anywhere, after = pattern.partition("**")
    if not anywhere:
        return sorted(Path(name) for name in glob.glob(pattern))
    folders = sorted(Path(name) for name in glob.glob(before or ".") if Path(name).is_dir())
    if not after.strip("/"):
        return folders
    # The standard library would follow a link that leads back for ever.
    below = [file for folder in folders for file in files_below(folder, leave_out, hidden=False)]
    return [file for file in below if file.match(after.strip("/"))]


def _input(file: Path, domain: str, format: str) -> Input:
    status = file.stat()
    return Input(file, domain, format, status.st_size, status.st_mtime_ns)


def _format(path: Path) -> str | None:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return FORMATS.get(suffixes[-1]) if suffixes else None


def _known_format(path: Path) -> str:
    found = _format(path)
    if found is None:
        raise ConfigurationError(f"'{path}' is of no known format, expected {_KNOWN}, or --format")
    return found


def _holds_something(found: Input, text_key: str, leave_out: LeaveOut) -> bool:
    """Say whether the file has any content.

    Raises:
        ConfigurationError: The first record has no such key.
        CheckpointError: The file cannot be read.
    """
    if found.size == 0:
        leave_out(found.path, NOTHING)
        return False
    try:
        if found.format == "parquet":
            rows = _check_column(found.path, text_key)
            first = b"x" * min(rows, 1)
        else:
            with open_bytes(found.path) as file:
                first = file.readline() if found.format == "jsonl" else file.read(1)
    except read_errors() as reason:
        raise CheckpointError(
            f"'{found.path}' cannot be read: {reason}; copy it anew, or leave it out"
        ) from None
    if not first:
        leave_out(found.path, NOTHING)
    elif found.format == "jsonl":
        _check_key(found.path, first, text_key)
    return bool(first)


def _check_key(path: Path, first: bytes, text_key: str) -> None:
    """Check the first record if it is whole. Records that are not are counted when they are read."""
    try:
        record = parse_record(first.decode("utf-8-sig"))
    except ValueError:
        return
    if isinstance(record, dict) and text_key not in record:
        raise ConfigurationError(
            f"'{path}:1' has no key '{text_key}', expected --text-key with one of: {', '.join(record)}"
        )


def _check_column(path: Path, text_key: str) -> int:
    """Return the number of rows of the file, which has to have the column."""
    import pyarrow
    from pyarrow import parquet

    try:
        schema = parquet.read_schema(path)
        rows = parquet.read_metadata(path).num_rows
    except pyarrow.ArrowInvalid as reason:
        raise CheckpointError(
            f"'{path}' is no parquet file: {reason}; copy it anew, or leave it out"
        ) from None
    if text_key not in schema.names:
        raise ConfigurationError(
            f"'{path}' has no column '{text_key}', expected --text-key with one of: {', '.join(schema.names)}"
        )
    kind = schema.field(text_key).type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        raise ConfigurationError(f"column '{text_key}' of '{path}' is {kind}, expected string")
    return rows
