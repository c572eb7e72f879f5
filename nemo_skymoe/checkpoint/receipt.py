"""The receipt beside a converted checkpoint: from what, by which command, and the checksum of every tensor."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_skymoe.checkpoint.checksums import FileChecksum, is_sha256
from nemo_skymoe.checkpoint.reading import read_bytes
from nemo_skymoe.checkpoint.stand_in import refuse_pointer
from nemo_skymoe.config import ConfigurationError

RECEIPT = "skymoe_receipt.json"
VERSION = 1
_LONGEST = 1 << 28
Known = tuple[FileChecksum, Path]
"""A checksum, and the file that says so."""
_SUMS = ("SHA256SUMS", "SHA256SUMS.txt", "sha256sums.txt", "sha256sum.txt", "checksums.sha256")


def receipt_bytes(
    identity: Mapping[str, Any], sources: Sequence[Mapping[str, Any]], files: Mapping[str, FileChecksum]
) -> bytes:
    """The file itself: nothing in it depends on when, or in how many attempts, the job was done."""
    receipt = {
        "receipt": VERSION,
        **identity,
        "sources": list(sources),
        "files": {name: checksum.to_json() for name, checksum in files.items()},
    }
    return (json.dumps(receipt, indent=1, ensure_ascii=False) + "\n").encode()


def same_receipt(receipt: Mapping[str, Any], files: Mapping[str, FileChecksum]) -> bytes:
    """The file of a receipt that was read, as it was written; `files` may have other checksums."""
    identity = {key: value for key, value in receipt.items() if key not in ("receipt", "sources", "files")}
    return receipt_bytes(identity, receipt["sources"], files)


def read_receipt(folder: Path) -> dict[str, Any] | None:
    """A folder's receipt; None without one.

    Keys: `job` as it was given to `job.run`; `sources`, a list of `folder` and `files`; `files`, by path in the folder.
    A checksum has `bytes`, `sha256`, and perhaps `tensors` by chunk, each [start, bytes, sha256], and `nonfinite`.

    Raises:
        ConfigurationError: There is something else in its place.
    """
    file = folder / RECEIPT
    if not file.is_file():
        return None
    refuse_pointer(file)
    try:
        size = file.stat().st_size
        receipt = json.loads(read_bytes(file, 0, size)) if size <= _LONGEST else None
        if not isinstance(receipt, dict) or receipt["receipt"] != VERSION:
            raise ValueError(f"expected version {VERSION}")
        if not isinstance(receipt["job"], dict) or not isinstance(receipt["sources"], list):
            raise ValueError("expected job and sources")
        for checksum in receipt["files"].values():
            FileChecksum.from_json(checksum)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as reason:
        raise ConfigurationError(f"'{file}' is damaged: {reason}") from None
    return receipt


def known_checksums(files: Sequence[Path]) -> dict[Path, Known]:
    """What a source says of its own files: in a receipt, SHA256SUMS, or Hugging Face's records of a download."""
    known: dict[Path, Known] = {}
    wanted = set(files)
    for folder in {folder for file in files for folder in (file.parent, file.parent.parent)}:
        receipt = read_receipt(folder) or {"files": {}}
        listed = {name: FileChecksum.from_json(value) for name, value in receipt["files"].items()}
        places = {name: folder / RECEIPT for name in listed}
        for sums in (folder / name for name in _SUMS if (folder / name).is_file()):
            for name, sha256 in _listed(sums).items():
                if name not in listed and folder / name in wanted:
                    listed[name] = FileChecksum((folder / name).stat().st_size, sha256)
                    places[name] = sums
        known |= {folder / name: (checksum, places[name]) for name, checksum in listed.items()}
    for file in files:
        sidecar = file.with_name(f"{file.name}.sha256")
        sha256 = _listed(sidecar).get(file.name) if sidecar.is_file() else None
        found = (FileChecksum(file.stat().st_size, sha256), sidecar) if sha256 else _hugging_face(file)
        if file not in known and found is not None:
            known[file] = found
    return known


def _listed(sums: Path) -> dict[str, str]:
    """What `sha256sum` wrote, by name."""
    pairs = (line.partition(" ") for line in sums.read_text(errors="replace").splitlines())
    return {
        name.lstrip(" *").removeprefix("./"): sha256.lower()
        for sha256, _, name in pairs
        if is_sha256(sha256.lower())
    }


def _hugging_face(file: Path) -> Known | None:
    """A large file's blob in the hub's cache is named by its sha256; a download to a folder keeps it in a record."""
    record = file.parent / ".cache" / "huggingface" / "download" / f"{file.name}.metadata"
    lines = record.read_text(errors="replace").splitlines() if record.is_file() else []
    for sha256, place in (
        (file.resolve().name, file.resolve()),
        (lines[1] if len(lines) > 1 else "", record),
    ):
        if is_sha256(sha256):
            return FileChecksum(file.stat().st_size, sha256), place
    return None
