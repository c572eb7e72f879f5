"""`skymoe inspect` shows a checkpoint, from its headers and its configuration alone. Without torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nemo_skymoe.checkpoint.companions import companion_kinds
from nemo_skymoe.checkpoint.formats import FORMATS, form_of
from nemo_skymoe.checkpoint.next_commands import next_commands
from nemo_skymoe.checkpoint.run_folder import checkpoint_of, receipt_folder
from nemo_skymoe.checkpoint.sources import Source, open_source
from nemo_skymoe.checkpoint.tensors.model import Key, Storage, TensorInfo
from nemo_skymoe.checkpoint.tensors.regions import DTYPE_SIZES
from nemo_skymoe.durable.errors import ConfigurationError
from nemo_skymoe.durable.receipt import RECEIPT, read_receipt
from nemo_skymoe.durable.stand_in import refuse_pointer


@dataclass
class Inspection:
    """The properties of a checkpoint. If one of them cannot be found out, it is None, and `problems` says why."""

    folder: str
    format: str
    architecture: dict[str, Any] | None = None
    parameters: int | None = None
    activated_parameters: int | None = None
    options: dict[str, Any] | None = None
    """The rest of the description: rotary embedding, norm, lengths, token ids, and the gate of an MoE."""
    tensors: int | None = None
    bytes: int | None = None
    dtypes: dict[str, int] = field(default_factory=dict)
    """Number of tensors by data type."""
    files: int | None = None
    vocabulary_rows: int | None = None
    """Rows of the embedding as stored: the vocabulary and its padding."""
    tokenizer: list[str] = field(default_factory=list)
    other_files: dict[str, list[str]] = field(default_factory=dict)
    """Other files that travel with the model, by kind: chat templates, generation defaults, processors, terms."""
    receipt: dict[str, Any] | None = None
    """The job that wrote the checkpoint, if this package wrote it."""
    not_checked: str = "the values of the weights: headers, names, shapes and sizes alone were read"
    next: dict[str, str] = field(default_factory=dict)
    """Commands that take the checkpoint further, by what they do; none if there are problems."""
    problems: list[str] = field(default_factory=list)


def inspect(folder: Path, config: Path | None = None) -> Inspection:
    """Look at a checkpoint without reading its weights.

    Args:
        folder: The folder of a checkpoint, or that of a run, which stands for its last checkpoint.
        config: A config.json for a Megatron checkpoint that does not describe itself.

    Raises:
        ConfigurationError: The folder holds no checkpoint of a known format.
    """
    folder = checkpoint_of(folder)
    form = form_of(folder)
    found = Inspection(str(folder), FORMATS[form].title)
    source: Source | None = None
    try:
        _describe_storage(found, FORMATS[form].storage(folder))
        source = open_source(folder, config)
        _describe_model(found, source)
    except ConfigurationError as problem:
        found.problems.append(str(problem))
    _describe_receipt(found, folder)
    if source is not None and config is None and not found.problems:
        found.next = next_commands(folder, form, source.description)
    return found


def _describe_storage(found: Inspection, storage: Storage) -> None:
    infos = storage.tensors.values()
    found.tensors, found.files = len(infos), len(storage.files)
    found.bytes = sum(map(_bytes, infos))
    found.dtypes = dict(Counter(info.dtype for info in infos))


def _bytes(info: TensorInfo) -> int:
    """Return the size of a tensor of any data type, also one that no weights have."""
    count = DTYPE_SIZES[info.dtype]
    for size in info.shape:
        count *= size
    return count


def _describe_model(found: Inspection, source: Source) -> None:
    description = source.description
    sizes = description.architecture
    found.architecture = asdict(sizes)
    if sizes.num_moe_experts is None:
        found.architecture = {k: v for k, v in found.architecture.items() if "moe_" not in k}
    found.parameters, found.activated_parameters = sizes.parameters, sizes.activated_parameters
    options = {name: getattr(description, name) for name in description.__dataclass_fields__}
    for name in ("architecture", "raw"):
        del options[name]
    if sizes.num_moe_experts is None:
        options = {name: value for name, value in options.items() if not name.startswith("moe_")}
    found.options = options
    found.vocabulary_rows = _embedding_rows(source)
    if source.tokenizer is not None:
        kinds = companion_kinds(source.tokenizer)
        for name in sorted(kinds):
            refuse_pointer(source.tokenizer / name)
            if kinds[name] == "tokenizer":
                found.tokenizer.append(name)
            else:
                found.other_files.setdefault(kinds[name], []).append(name)


def _embedding_rows(source: Source) -> int:
    for name, info in source.weights.storage.tensors.items():
        if "embed" in name and len(info.shape) == 2:
            return info.shape[0]
    return source.weights.info(Key("embedding")).shape[0]


def _describe_receipt(found: Inspection, folder: Path) -> None:
    try:
        folder = receipt_folder(folder)
        written = read_receipt(folder)
    except ConfigurationError as problem:
        found.problems.append(str(problem))
    else:
        if written is None:
            return
        found.receipt = written["job"]
        found.problems += _missing_or_cut(folder, written["files"])
        found.not_checked = (
            f"the bytes of the {len(written['files'])} files: their sizes alone were compared with {RECEIPT}; to read them,"
            " run skymoe verify, or the command that wrote them once more"
        )


def _missing_or_cut(folder: Path, files: Mapping[str, Any]) -> list[str]:
    """Return the files of a receipt that do not exist, or have another size."""
    sizes = {name: path.stat().st_size for name in files if (path := folder / name).is_file()}
    problems = [f"'{folder / name}' is missing" for name in files if name not in sizes]
    return problems + [
        f"'{folder / name}' is {size:,} bytes, expected {files[name]['bytes']:,}"
        for name, size in sizes.items()
        if size != files[name]["bytes"]
    ]
