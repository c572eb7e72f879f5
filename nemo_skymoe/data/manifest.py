"""`dataset.json` says what the dataset of each domain in a prepared folder holds, and which tokenizer made it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from nemo_skymoe import __version__
from nemo_skymoe.data.documents import EMPTY, UNDECODABLE
from nemo_skymoe.data.shard import Record
from nemo_skymoe.data.work import Work
from nemo_skymoe.durable.errors import CheckpointError

MANIFEST = "dataset.json"


@dataclass(frozen=True)
class Domain:
    """The contents of a domain's dataset. The `empty` and `undecodable` documents are not in it."""

    files: int
    documents: int
    tokens: int
    text_bytes: int
    empty: int
    undecodable: int


def read_manifest(folder: Path) -> dict[str, Domain]:
    """Return the domains of a prepared folder.

    Raises:
        CheckpointError: The folder is not one.
    """
    try:
        values = json.loads((folder / MANIFEST).read_bytes())
        return {name: Domain(**domain) for name, domain in values["domains"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(f"'{folder}' has no {MANIFEST}: make it with skymoe preprocess") from None


def manifest_bytes(work: Work, domains: Mapping[str, Domain]) -> bytes:
    """Return the content of the file."""
    values = {
        "version": __version__,
        "tokenizer": work.tokenizer_checksum,
        "vocab_size": work.tokenizer.size,
        "end_of_document": work.tokenizer.end_of_document,
        "text_key": work.text_key,
        "domains": {name: asdict(domain) for name, domain in domains.items()},
    }
    return (json.dumps(values, indent=2) + "\n").encode()


def summary(work: Work, name: str, records: Sequence[Record]) -> Domain:
    """Return the domain `name`, whose shards have these records."""
    reasons = [reason for record in records for *_, reason in record.rejected]
    return Domain(
        files=sum(found.domain == name for found in work.inputs),
        documents=sum(record.documents for record in records),
        tokens=sum(record.tokens for record in records),
        text_bytes=sum(record.text_bytes for record in records),
        empty=sum(reason.startswith(EMPTY) for reason in reasons),
        undecodable=sum(reason.startswith(UNDECODABLE) for reason in reasons),
    )
