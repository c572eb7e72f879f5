"""The receipt in the output of a job: its sources, its command, and the checksum of every tensor."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_skymoe.durable.checksums import FileChecksum
from nemo_skymoe.durable.errors import CheckpointError
from nemo_skymoe.durable.reading import read_bytes
from nemo_skymoe.durable.stand_in import refuse_pointer

RECEIPT = "skymoe_receipt.json"
VERSION = 1
_LONGEST = 1 << 28


def receipt_bytes(
    identity: Mapping[str, Any], sources: Sequence[Mapping[str, Any]], files: Mapping[str, FileChecksum]
) -> bytes:
    """Return the content of the file. It does not depend on when, or in how many attempts, the job was done."""
    receipt = {
        "receipt": VERSION,
        **identity,
        "sources": list(sources),
        "files": {name: checksum.to_json() for name, checksum in files.items()},
    }
    return (json.dumps(receipt, indent=1, ensure_ascii=False) + "\n").encode()


def same_receipt(receipt: Mapping[str, Any], files: Mapping[str, FileChecksum]) -> bytes:
    """Return the content of a receipt that was read, as it was written. `files` may have other checksums."""
    identity = {key: value for key, value in receipt.items() if key not in ("receipt", "sources", "files")}
    return receipt_bytes(identity, receipt["sources"], files)


def read_receipt(folder: Path) -> dict[str, Any] | None:
    """Read a folder's receipt, or return None if it has none.

    Its keys are `job`, as it was given to `job.run`; `sources`, a list of `folder` and `files`; and `files`, by path in
    the folder. A checksum has `bytes`, `sha256`, and perhaps `tensors` by chunk, each [start, bytes, sha256], and
    `nonfinite`.

    Raises:
        CheckpointError: There is something else in its place.
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
        raise CheckpointError(f"'{file}' is damaged: {reason}") from None
    return receipt
