"""Turn files of text into one indexed dataset per domain. The same command continues a job that was killed.

A refusal never deletes finished work. A shard is named by its contents, so that a command with some of its inputs
corrected continues with all shards of the others.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from nemo_skymoe.checkpoint import companions
from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.data import indexed, shard
from nemo_skymoe.data import tokenizer as tokenizers
from nemo_skymoe.data.documents import first_document, split
from nemo_skymoe.data.inputs import UNKNOWN, Input, find_inputs
from nemo_skymoe.data.manifest import MANIFEST, Domain, manifest_bytes, read_manifest, summary
from nemo_skymoe.data.work import Work
from nemo_skymoe.durable.errors import JobError
from nemo_skymoe.durable.files import write_small, write_whole
from nemo_skymoe.durable.journal import JOURNAL
from nemo_skymoe.durable.pool import share
from nemo_skymoe.durable.progress import Progress, ProgressCounter
from nemo_skymoe.durable.receipt import RECEIPT, read_receipt, receipt_bytes
from nemo_skymoe.durable.unfinished import absolute, publish, unfinished

REJECTED, TOKENIZER = "rejected.txt", "tokenizer"
_SHARDS = "shards"
SHARD_BYTES = 16 << 20
_NAMED = 3
"""Number of left-out files that a line names. All of them are in `rejected.txt`."""


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
        ConfigurationError: Bad options, an output that exists, or a domain without documents.
        CheckpointError: A file of the inputs or the tokenizer cannot be read.
        JobError: The folder is another job's or process's, the disk is full, or a worker died. What is finished stays.
    """
    output = absolute(output)
    _check(output, workers)
    left_out: list[tuple[Path, str]] = []
    found = find_inputs(inputs, text_key, formats, lambda path, reason: left_out.append((path, reason)))
    loaded = tokenizers.load(tokenizer, end_of_document)
    _check_domains(found, text_key)
    _tell(left_out, say or (lambda _: None))
    shards, file = split(found, shard_bytes), tokenizers.tokenizer_file(tokenizer)
    work = Work(found, shards, loaded, file, text_key, left_out)
    identity = {"job": work.identity(shard_bytes)}
    with unfinished(output, identity, keep=_something_is_finished) as journal:
        if not _is_written(journal.folder, work):
            _write(work, journal.folder, workers, ProgressCounter(work.bytes, progress))
            receipt = receipt_bytes(identity | {"inputs": work.inputs_checksum()}, [], {})
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
    """Check that every domain has a document, before anything is tokenised."""
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
    """Print a line for each reason: how many files, with which suffixes, and the first of them by name."""
    by_reason: dict[str, list[Path]] = {}
    for path, reason in left_out:
        by_reason.setdefault(reason.partition(" (")[0], []).append(path)
    for reason, paths in by_reason.items():
        names = ", ".join(f"'{path}'" for path in paths[:_NAMED])
        more = f" and {len(paths) - _NAMED} more, see {REJECTED}" if len(paths) > _NAMED else ""
        suffixes = Counter(path.suffix or "without suffix" for path in paths).most_common()
        counted = ", ".join(f"{count} {suffix}" for suffix, count in suffixes)
        say(f"not read, {reason}{f' ({counted})' if reason == UNKNOWN else ''}: {names}{more}")


def _is_written(folder: Path, work: Work) -> bool:
    """Say whether the last attempt ended between its last steps.

    Raises:
        JobError: It did, with other inputs.
    """
    receipt = read_receipt(folder)
    if receipt is not None and receipt.get("inputs") != work.inputs_checksum():
        raise JobError(
            f"'{folder}' holds the finished work of this command with other inputs: run it with those to get its"
            " output, or delete the folder to start over"
        )
    return receipt is not None


def _something_is_finished(folder: Path) -> bool:
    """Say whether an unfinished folder has something to continue from."""
    return (folder / RECEIPT).exists() or any((folder / _SHARDS).glob("*.json"))


def _write(work: Work, folder: Path, workers: int, counter: ProgressCounter) -> None:
    def advance(count: int) -> None:
        counter.advance(count, "tokens")

    def write_shards(numbers: Iterator[int], advance: Callable[[int], None]) -> None:
        for number in numbers:
            shard.write(prefixes[number], work.shards[number], work, advance)

    prefixes = [folder / _SHARDS / name for name in work.shard_names()]
    remaining = _keep_finished(folder, prefixes)
    advance(work.bytes - sum(map(work.shard_bytes, remaining)))
    share(remaining, write_shards, workers, advance)
    records = [record for prefix in prefixes if (record := shard.finished(prefix)) is not None]
    assert len(records) == len(prefixes)
    domains = {name: summary(work, name, [records[n] for n in ns]) for name, ns in work.domains().items()}
    _refuse_empty(domains)
    for name, numbers in work.domains().items():
        indexed.join([prefixes[n] for n in numbers if records[n].documents], folder / name)
    write_whole(folder / REJECTED, lambda file: file.writelines(_rejected(work, records)))
    _copy_tokenizer(work, folder / TOKENIZER)
    write_small(folder / MANIFEST, manifest_bytes(work, domains))


def _keep_finished(folder: Path, prefixes: Sequence[Path]) -> list[int]:
    """Delete all but complete shards, also those that these inputs do not need, and return the shards to write."""
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
    """Make the check of `_check_domains` again, because a file may have lost its documents since."""
    for name, domain in domains.items():
        if not domain.documents:
            raise ConfigurationError(
                f"the domain '{name}' has no document in {domain.files} files: {domain.empty} empty,"
                f" {domain.undecodable} undecodable; the other domains are kept: run the command again with this one"
                " corrected or without it"
            )


def _rejected(work: Work, records: Sequence[shard.Record]) -> Iterator[bytes]:
    """Yield `file: not read, reason`, and then `file:line: reason`, where a line is counted in its file."""
    for path, reason in work.left_out:
        yield f"{path}: not read, {reason}\n".encode(errors="replace")
    before = [0] * len(work.inputs)
    for pieces, record in zip(work.shards, records, strict=True):
        starts = []
        for piece, count in zip(pieces, record.read, strict=True):
            starts.append(before[piece.input])
            before[piece.input] += count
        for position, number, reason in record.rejected:
            found = work.inputs[pieces[position].input]
            line = "" if found.format == "text" else f":{starts[position] + number}"
            yield f"{found.path}{line}: {reason}\n".encode(errors="replace")


def _copy_tokenizer(work: Work, folder: Path) -> None:
    """Copy what loads the tokenizer: its own file, under the usual name, and the settings beside it.

    A training saves this tokenizer in its checkpoints, so that the chat template comes into their exports.
    """
    file = work.tokenizer_file
    folder.mkdir(exist_ok=True)
    usual = tokenizers.TOKENIZER_JSON if file.suffix == ".json" else tokenizers.SENTENCEPIECE
    write_small(folder / usual, file.read_bytes())
    settings = (tokenizers.CONFIG, "special_tokens_map.json", "added_tokens.json")
    for pattern in (*settings, *companions.KINDS["chat templates"]):
        for beside in filter(Path.is_file, file.parent.glob(pattern)):
            target = folder / beside.relative_to(file.parent)
            target.parent.mkdir(exist_ok=True)
            write_small(target, beside.read_bytes())
    if file.suffix == ".json" and not (folder / tokenizers.CONFIG).is_file():
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": work.tokenizer.end_token,
            "model_input_names": tokenizers.MODEL_INPUTS,
        }
        write_small(folder / tokenizers.CONFIG, json.dumps(config).encode())
