"""Find the checksums that a source gives of its files: in its receipt, in lists, or in Hugging Face's records."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nemo_skymoe.durable.checksums import FileChecksum, is_sha256
from nemo_skymoe.durable.receipt import RECEIPT, read_receipt

Known = tuple[FileChecksum, Path]
"""A checksum, and the file that says so."""
_SUMS = ("SHA256SUMS", "SHA256SUMS.txt", "sha256sums.txt", "sha256sum.txt", "checksums.sha256")


def known_checksums(files: Sequence[Path]) -> dict[Path, Known]:
    """Return the checksums that a source gives of its files: in a receipt, SHA256SUMS, or records of a download."""
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
    """Return the checksums that `sha256sum` wrote, by name."""
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
