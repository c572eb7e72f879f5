"""Files of text into one indexed dataset a domain; it can be killed at any moment and continued by the same command.

Finished work is never deleted by a refusal. A shard is named by what it is made of, so that a command with some of its
inputs corrected goes on with all shards of the others.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nemo_skymoe import __version__
from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.data import indexed, shard
from nemo_skymoe.data import tokenizer as tokenizers
from nemo_skymoe.data.documents import EMPTY, UNDECODABLE, Piece, first_document, split
from nemo_skymoe.data.inputs import UNKNOWN, Input, find_inputs
from nemo_skymoe.durable.errors import JobError
from nemo_skymoe.durable.files import write_small, write_whole
from nemo_skymoe.durable.journal import JOURNAL
from nemo_skymoe.durable.pool import share
from nemo_skymoe.durable.receipt import RECEIPT, read_receipt, receipt_bytes
from nemo_skymoe.durable.unfinished import absolute, publish, unfinished

MANIFEST, REJECTED, TOKENIZER = "dataset.json", "rejected.txt", "tokenizer"
_SHARDS = "shards"
SHARD_BYTES = 16 << 20
_NAMED = 3
"""Left-out files named in a line; all of them are in `rejected.txt`."""
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Domain:
    """What the dataset of a domain holds; `empty` and `undecodable` documents are not in it."""

    files: int
    documents: int
    tokens: int
    text_bytes: int
    empty: int
    undecodable: int


def preprocess(
    inputs: Sequence[str],
    output: Path,
    tokenizer: Path,
    *,
    text_key: str = "text",
    formats: Sequence[str] = (),
    end_of_document: str | None = None,
    workers: int = 1,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, Domain]:
    """Write `output`/DOMAIN.bin and .idx, `dataset.json`, `rejected.txt` and the tokenizer, or finish what was begun.

    Everything happens in `<output>.unfinished`, which is renamed at the very end. The bytes depend neither on the
    number of workers nor on interruptions. What an attempt has finished stays there whatever ends it: the same command,
    with inputs corrected, added or taken away where that is needed, goes on from it.

    Args:
        inputs: `PATH` or `DOMAIN=PATH`, with `text_key` and `formats`: see `find_inputs`.
        tokenizer: Folder or file: see `tokenizer.load`.
        progress: Called with bytes done, bytes in all and what is being done.
        say: Called with a line on the files that are found and not read, before any work.
        shard_bytes: Of text that is tokenised in one go; what an interruption costs.

    Raises:
        ConfigurationError: Bad inputs, an output that exists or is another job's, a disk that is full, a domain
            without documents.
    """
    output = absolute(output)
    _check(output, workers)
    left_out: list[tuple[Path, str]] = []
    found = find_inputs(inputs, text_key, formats, lambda path, reason: left_out.append((path, reason)))
    loaded = tokenizers.load(tokenizer, end_of_document)
    _check_domains(found, text_key)
    _tell(left_out, say or (lambda _: None))
    job = _Job(found, split(found, shard_bytes), loaded, text_key, left_out)
    identity = {"job": job.identity(tokenizer, shard_bytes)}
    with unfinished(output, identity, keep=_something_is_finished) as journal:
        if not _is_written(journal.folder, job):
            _write(job, journal.folder, tokenizer, workers, progress or (lambda *_: None))
            receipt = receipt_bytes(identity | {"inputs": job.inputs_checksum()}, [], {})
            write_small(journal.folder / RECEIPT, receipt)
        shutil.rmtree(journal.folder / _SHARDS, ignore_errors=True)
        publish(journal, output)
    return read_manifest(output)


def _check(output: Path, workers: int) -> None:
    if workers < 1:
        raise ConfigurationError(f"workers is {workers}, expected at least 1")
    if os.path.lexists(output):
        raise ConfigurationError(f"'{output}' exists: expected a new folder")


def _check_domains(inputs: Sequence[Input], text_key: str) -> None:
    """Every domain has a document: found out before anything is tokenised."""
    for name in dict.fromkeys(found.domain for found in inputs):
        own = [found for found in inputs if found.domain == name]
        first = first_document(own, text_key)
        if first is None or first.rejected:
            why = f", the first for this reason: {first.rejected}" if first else ""
            raise ConfigurationError(
                f"the domain '{name}' has no document in {len(own)} files: what they hold is left out{why}; expected text"
                " there, or a command without this domain"
            )


def _tell(left_out: Sequence[tuple[Path, str]], say: Callable[[str], None]) -> None:
    """A line a reason: how many, of which suffixes, and the first of them by name."""
    by_reason: dict[str, list[Path]] = {}
    for path, reason in left_out:
        by_reason.setdefault(reason.partition(" (")[0], []).append(path)
    for reason, paths in by_reason.items():
        names = ", ".join(f"'{path}'" for path in paths[:_NAMED])
        more = f" and {len(paths) - _NAMED} more, see {REJECTED}" if len(paths) > _NAMED else ""
        suffixes = Counter(path.suffix or "without suffix" for path in paths).most_common()
        counted = ", ".join(f"{count} {suffix}" for suffix, count in suffixes)
        say(f"not read, {reason}{f' ({counted})' if reason == UNKNOWN else ''}: {names}{more}")


def _is_written(folder: Path, job: _Job) -> bool:
    """Whether the last attempt ended between its last steps.

    Raises:
        JobError: It did, with other inputs.
    """
    receipt = read_receipt(folder)
    if receipt is not None and receipt.get("inputs") != job.inputs_checksum():
        raise JobError(
            f"'{folder}' holds the finished work of this command with other inputs: run it with those to get its"
            " output, or delete the folder to start over"
        )
    return receipt is not None


def _something_is_finished(folder: Path) -> bool:
    """Whether an unfinished folder has something to go on from."""
    return (folder / RECEIPT).exists() or any((folder / _SHARDS).glob("*.json"))


def read_manifest(folder: Path) -> dict[str, Domain]:
    """The domains of a prepared folder.

    Raises:
        ConfigurationError: It is none.
    """
    try:
        values = json.loads((folder / MANIFEST).read_bytes())
        return {name: Domain(**domain) for name, domain in values["domains"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ConfigurationError(f"'{folder}' has no {MANIFEST}: make it with skymoe preprocess") from None


@dataclass(frozen=True)
class _Job:
    inputs: list[Input]
    shards: list[list[Piece]]
    tokenizer: tokenizers.TextTokenizer
    text_key: str
    left_out: list[tuple[Path, str]]

    @property
    def bytes(self) -> int:
        return sum(piece.bytes for pieces in self.shards for piece in pieces)

    def domains(self) -> dict[str, list[int]]:
        """Numbers of each domain's shards."""
        domains: dict[str, list[int]] = {found.domain: [] for found in self.inputs}
        for number, pieces in enumerate(self.shards):
            domains[self.inputs[pieces[0].input].domain].append(number)
        return domains

    def shard_names(self) -> list[str]:
        """A name for each shard: equal for the same pieces of the same files."""
        return [
            _checksum([[*_signature(self.inputs[piece.input]), piece.start, piece.stop] for piece in pieces])[
                :16
            ]
            for pieces in self.shards
        ]

    def inputs_checksum(self) -> str:
        """Equal for the same files in the same domains."""
        return _checksum([[found.domain, *_signature(found)] for found in self.inputs])

    def identity(self, tokenizer: Path, shard_bytes: int) -> dict[str, Any]:
        """What has to be equal for a shard to be of use; its inputs are in its name."""
        return {
            "command": "preprocess",
            "version": __version__,
            "tokenizer": _sha256(tokenizers.tokenizer_file(tokenizer)),
            "end_of_document": self.tokenizer.end_of_document,
            "text_key": self.text_key,
            "shard_bytes": shard_bytes,
        }


def _signature(found: Input) -> list[Any]:
    return [str(found.path), found.format, found.size, found.modified]


def _checksum(values: Any) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def _write(job: _Job, folder: Path, tokenizer: Path, workers: int, progress: Progress) -> None:
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress(min(done, job.bytes), job.bytes, "tokens")

    def write_shards(numbers: Iterator[int], advance: Callable[[int], None]) -> None:
        for number in numbers:
            shard.write(
                prefixes[number], job.shards[number], job.inputs, job.tokenizer, job.text_key, advance
            )

    prefixes = [folder / _SHARDS / name for name in job.shard_names()]
    remaining = _keep_finished(folder, prefixes)
    advance(sum(piece.bytes for n in set(range(len(prefixes))) - set(remaining) for piece in job.shards[n]))
    share(remaining, write_shards, workers, advance)
    records = [record for prefix in prefixes if (record := shard.finished(prefix)) is not None]
    assert len(records) == len(prefixes)
    domains = {name: _summary(job, name, [records[n] for n in ns]) for name, ns in job.domains().items()}
    _refuse_empty(domains)
    for name, numbers in job.domains().items():
        indexed.join([prefixes[n] for n in numbers if records[n].documents], folder / name)
    write_whole(folder / REJECTED, lambda file: file.writelines(_rejected(job, records)))
    _copy_tokenizer(tokenizer, job.tokenizer, folder / TOKENIZER)
    write_small(folder / MANIFEST, _manifest(job, tokenizer, domains))


def _keep_finished(folder: Path, prefixes: Sequence[Path]) -> list[int]:
    """Delete all but complete shards, also those that these inputs do not need; the numbers of shards to write."""
    (folder / _SHARDS).mkdir(exist_ok=True)
    complete = {
        prefix
        for record in (folder / _SHARDS).glob("*.json")
        if shard.finished(prefix := record.with_suffix("")) is not None
    }
    kept = {file for prefix in complete for file in shard.files(prefix)}
    for path in (*folder.iterdir(), *(folder / _SHARDS).iterdir()):
        if path not in {*kept, folder / JOURNAL, folder / _SHARDS}:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return [number for number, prefix in enumerate(prefixes) if prefix not in complete]


def _refuse_empty(domains: dict[str, Domain]) -> None:
    """The same as `_check_domains`, should a file have lost its documents since."""
    for name, domain in domains.items():
        if not domain.documents:
            raise ConfigurationError(
                f"the domain '{name}' has no document in {domain.files} files: {domain.empty} empty,"
                f" {domain.undecodable} undecodable; the other domains are kept: run the command again with this one"
                " corrected or without it"
            )


def _summary(job: _Job, name: str, records: Sequence[shard.Record]) -> Domain:
    reasons = [reason for record in records for *_, reason in record.rejected]
    return Domain(
        files=sum(found.domain == name for found in job.inputs),
        documents=sum(record.documents for record in records),
        tokens=sum(record.tokens for record in records),
        text_bytes=sum(record.text_bytes for record in records),
        empty=sum(reason.startswith(EMPTY) for reason in reasons),
        undecodable=sum(reason.startswith(UNDECODABLE) for reason in reasons),
    )


def _rejected(job: _Job, records: Sequence[shard.Record]) -> Iterator[bytes]:
    """`file: not read, reason`; then `file:line: reason`, where a line is counted in its file."""
    for path, reason in job.left_out:
        yield f"{path}: not read, {reason}\n".encode(errors="replace")
    before = [0] * len(job.inputs)
    for pieces, record in zip(job.shards, records, strict=True):
        starts = []
        for piece, count in zip(pieces, record.read, strict=True):
            starts.append(before[piece.input])
            before[piece.input] += count
        for position, number, reason in record.rejected:
            found = job.inputs[pieces[position].input]
            line = "" if found.format == "text" else f":{starts[position] + number}"
            yield f"{found.path}{line}: {reason}\n".encode(errors="replace")


def _copy_tokenizer(tokenizer: Path, loaded: tokenizers.TextTokenizer, folder: Path) -> None:
    """What loads it: its own file, under the usual name, and the settings beside it."""
    file = tokenizers.tokenizer_file(tokenizer)
    folder.mkdir(exist_ok=True)
    usual = tokenizers.TOKENIZER_JSON if file.suffix == ".json" else tokenizers.SENTENCEPIECE
    write_small(folder / usual, file.read_bytes())
    for name in (tokenizers.CONFIG, "special_tokens_map.json", "added_tokens.json"):
        if (beside := file.with_name(name)).is_file():
            write_small(folder / name, beside.read_bytes())
    if file.suffix == ".json" and not (folder / tokenizers.CONFIG).is_file():
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": loaded.end_token}
        write_small(folder / tokenizers.CONFIG, json.dumps(config).encode())


def _manifest(job: _Job, tokenizer: Path, domains: dict[str, Domain]) -> bytes:
    values = {
        "version": __version__,
        "tokenizer": _sha256(tokenizers.tokenizer_file(tokenizer)),
        "vocab_size": job.tokenizer.size,
        "end_of_document": job.tokenizer.end_of_document,
        "text_key": job.text_key,
        "domains": {name: asdict(domain) for name, domain in domains.items()},
    }
    return (json.dumps(values, indent=2) + "\n").encode()


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
