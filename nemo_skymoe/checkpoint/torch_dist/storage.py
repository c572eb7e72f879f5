"""Megatron's `torch_dist` checkpoints, as saved at any parallel sizes, read without running their pickles."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_skymoe.checkpoint.tensors.buffers import empty
from nemo_skymoe.checkpoint.tensors.model import TensorInfo
from nemo_skymoe.checkpoint.tensors.regions import (
    DTYPE_SIZES,
    Box,
    Extent,
    box,
    box_shape,
    first_element,
    tensor_bytes,
)
from nemo_skymoe.checkpoint.tensors.saved_tensor import SavedTensor, find_tensor
from nemo_skymoe.checkpoint.untrusted import inert_pickle
from nemo_skymoe.checkpoint.untrusted.inert_pickle import Global, Record
from nemo_skymoe.durable.errors import CheckpointError, ConfigurationError
from nemo_skymoe.durable.reading import are_sizes, member, read_bytes, read_into
from nemo_skymoe.durable.stand_in import refuse_pointers

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS = "weights"
METADATA = ".metadata"
CONFIG = "metadata.json"
PREFIX = "module."
_LONGEST_METADATA = 1 << 30
_METADATA_MODULE = "torch.distributed.checkpoint.metadata"
_FILESYSTEM_MODULE = "torch.distributed.checkpoint.filesystem"
_PLANNER_MODULE = "torch.distributed.checkpoint.planner"
_MEGATRON_MODULE = "megatron.core.dist_checkpointing.strategies.torch"
_CLASSES = {
    _METADATA_MODULE: (
        *("Metadata", "StorageMeta", "MetadataIndex", "TensorProperties", "TensorStorageMetadata"),
        *("BytesStorageMetadata", "ChunkStorageMetadata", "_MEM_FORMAT_ENCODING"),
    ),
    _FILESYSTEM_MODULE: ("_StorageInfo", "_StoragePrefix"),
    _PLANNER_MODULE: ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData"),
    _MEGATRON_MODULE: ("MCoreMetadata", "MCoreSavePlan"),
    "torch": ("Size", *DTYPE_SIZES),
    "torch.serialization": ("_get_layout",),
    "pathlib": ("PosixPath",),
    "collections": ("OrderedDict",),
}
_ALLOWED = {f"{module}.{name}" for module, names in _CLASSES.items() for name in names}


@dataclass(frozen=True)
class _Piece:
    """A saved chunk: the box of the tensor that it holds, and where `torch.save` put it."""

    region: Box
    file: Path
    offset: int
    length: int


class TorchDistStorage:
    """The model's tensors, by their names with `module.`, of NeMo's `weights/` or of Megatron-LM's checkpoint.

    Optimizer state and extra states are left out. Reads the metadata only; tensors are gathered from whatever
    pieces they were saved in.

    Raises:
        CheckpointError: Metadata that is damaged or refers to anything but a checkpoint's classes; a file that is
            missing, too short, or outside the folder; pieces of a tensor that overlap or leave a hole.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self._weights = weights_folder(self.folder)
        metadata = read_metadata(self._weights / METADATA)
        entries = _model_tensors(metadata, self._weights / METADATA)
        self.tensors: Mapping[str, TensorInfo] = {name: info for name, (info, _) in entries.items()}
        self._pieces = {name: pieces for name, (_, pieces) in entries.items()}
        self._by_file: dict[Path, list[tuple[str, _Piece]]] = defaultdict(list)
        for name, pieces in self._pieces.items():
            for piece in pieces:
                self._by_file[piece.file].append((name, piece))
        self.files = (*sorted(self._by_file), self._weights / METADATA)
        sizes = {file: file.stat().st_size for file in self._by_file}
        for name, pieces in self._pieces.items():
            for piece in pieces:
                if piece.offset + piece.length > sizes[piece.file]:
                    raise CheckpointError(
                        f"'{piece.file}' is truncated: {sizes[piece.file]:,} bytes, expected"
                        f" {piece.offset + piece.length:,} for '{name}'"
                    )
            _check_cover(name, [piece.region for piece in pieces], self.tensors[name].shape)
        self._found: dict[_Piece, SavedTensor] = {}
        self._by_row = {name: _by_row(pieces) for name, pieces in self._pieces.items()}

    def extents(self, file: Path) -> list[Extent]:
        """Return the pieces of the model's tensors in one file by position."""
        held = []
        for name, piece in self._by_file.get(file, ()):
            saved = self._find(name, piece)
            held.append(Extent(name, saved.dtype, saved.start, saved.stop))
        return sorted(held, key=lambda extent: extent.start)

    def read(self, name: str, index: tuple[int, ...] = (), rows: tuple[int, int] | None = None) -> Tensor:
        """Read as `Storage.read` says."""
        info = self.tensors[name]
        region = box(info.shape, index, rows)
        tensor = empty(box_shape(region, index), info.dtype)
        target = tensor.view([stop - start for start, stop in region])
        for piece in self._overlapping(name, region):
            common = tuple(
                (max(a, c), min(b, d)) for (a, b), (c, d) in zip(region, piece.region, strict=True)
            )
            if any(start >= stop for start, stop in common):
                continue
            place = target[_within(common, region)]
            if place.is_contiguous():
                self._read_piece(name, piece, common, place)
            else:
                part = empty(place.shape, info.dtype)
                self._read_piece(name, piece, common, part)
                place.copy_(part)
        return tensor

    def _read_piece(self, name: str, piece: _Piece, region: Box, target: Tensor) -> None:
        """Fill `target` with a region of a piece: one run, since a read picks, takes rows, and then takes all."""
        saved = self._find(name, piece)
        local = tuple((a - c, b - c) for (a, b), (c, _) in zip(region, piece.region, strict=True))
        start = saved.start + first_element(local, saved.shape) * DTYPE_SIZES[saved.dtype]
        read_into(piece.file, start, tensor_bytes(target))

    def _overlapping(self, name: str, region: Box) -> list[_Piece]:
        starts, groups = self._by_row[name]
        if not region:
            return groups[0]
        first = max(0, bisect_right(starts, region[0][0]) - 1)
        last = bisect_right(starts, max(region[0][0], region[0][1] - 1))
        return [piece for group in groups[first:last] for piece in group]

    def _find(self, name: str, piece: _Piece) -> SavedTensor:
        if piece not in self._found:
            saved = find_tensor(piece.file, piece.offset, piece.length)
            shape = tuple(stop - start for start, stop in piece.region)
            dtype = self.tensors[name].dtype
            if (saved.dtype, saved.shape) != (dtype, shape):
                raise CheckpointError(
                    f"'{name}' in '{piece.file}' is {saved.dtype} {list(saved.shape)}, expected {dtype} {list(shape)}"
                )
            self._found[piece] = saved
        return self._found[piece]


def weights_folder(checkpoint: Path) -> Path:
    """Return the folder with the tensors of a NeMo checkpoint, or of Megatron-LM's, which has no `weights/`."""
    for folder in (checkpoint / WEIGHTS, checkpoint):
        refuse_pointers(folder, METADATA, CONFIG, "common.pt")
        if (folder / CONFIG).is_file():
            check_backend(folder / CONFIG)
        if (folder / METADATA).is_file() and (folder / CONFIG).is_file():
            return folder
        if (folder / METADATA).is_file():
            raise CheckpointError(
                f"'{folder}' has {METADATA} but no {CONFIG}: if it is Megatron's, copy that file anew; Megatron-Bridge's"
                " fsdp_dtensor must be saved with checkpoint.ckpt_format=torch_dist instead; a sharded checkpoint of FSDP"
                " must be gathered first (accelerate merge-weights FOLDER OUTPUT), with config.json and the"
                " tokenizer put beside the result"
            )
    raise CheckpointError(
        f"'{checkpoint}' is no torch_dist checkpoint: expected weights/{METADATA} and weights/{CONFIG}"
    )


def check_backend(config: Path) -> None:
    """Refuse the `metadata.json` of any other form: Megatron reads each with a strategy of its own."""
    try:
        backend = json.loads(config.read_text())["sharded_backend"]
    except (ValueError, KeyError, TypeError, RecursionError):
        backend = None
    if backend != "torch_dist":
        raise CheckpointError(
            f"'{config}' has the sharded_backend {backend!r}, expected 'torch_dist': load it with the Megatron that"
            " wrote it, and save it with --ckpt-format torch_dist"
        )


def read_metadata(file: Path) -> Record:
    """Return the metadata that the pickle of torch.distributed.checkpoint describes.

    Raises:
        CheckpointError: It is damaged, or refers to anything but a checkpoint's classes.
    """
    member(file.parent, file.name, file.parent)
    size = file.stat().st_size
    if not 0 < size <= _LONGEST_METADATA:
        raise CheckpointError(f"'{file}' is {size:,} bytes, expected 1 to {_LONGEST_METADATA:,}")
    metadata = inert_pickle.load(read_bytes(file, 0, size), _ALLOWED, file)
    if not isinstance(metadata, Record) or not metadata.kind.endswith("Metadata"):
        raise CheckpointError(f"'{file}' holds no checkpoint metadata")
    return metadata


def _model_tensors(metadata: Record, file: Path) -> dict[str, tuple[TensorInfo, list[_Piece]]]:
    """Return data type, global shape and pieces of every tensor that is the model's own."""
    try:
        described = {
            name: entry
            for name, entry in metadata.field("state_dict_metadata").items()
            if entry.kind == f"{_METADATA_MODULE}.TensorStorageMetadata" and "_extra_state" not in name
        }
        stored = {
            (index.field("fqn"), _sizes(index.field("offset"))): info
            for index, info in metadata.field("storage_data").items()
            if index.field("offset") is not None
        }
        names = [name for name in described if name.startswith(PREFIX)] or [
            name for name in described if not name.startswith(("optimizer.", "chained_"))
        ]
        if not names:
            raise ValueError("no tensor of a model")
        flattened = metadata.field("mcore_data") or {}
        return {name: _tensor(name, described[name], stored, flattened.get(name), file) for name in names}
    except (AttributeError, TypeError, KeyError, ValueError, IndexError) as reason:
        if isinstance(reason, ConfigurationError):
            raise
        raise CheckpointError(f"'{file}' is damaged: {reason!r}") from None


def _tensor(
    name: str, entry: Record, stored: Mapping[Any, Record], special: Any, file: Path
) -> tuple[TensorInfo, list[_Piece]]:
    shape = _sizes(entry.field("size"))
    dtype = entry.field("properties").state[0]
    if special:
        raise CheckpointError(f"'{name}' in '{file}' is flattened, expected the model's own shapes")
    if not isinstance(dtype, Global) or dtype.name.removeprefix("torch.") not in DTYPE_SIZES:
        raise ValueError(f"'{name}' has no known data type")
    pieces = []
    for chunk in entry.field("chunks"):
        offsets, sizes = _sizes(chunk.field("offsets")), _sizes(chunk.field("sizes"))
        info = stored[name, offsets]
        place = (info.field("offset"), info.field("length"))
        if not are_sizes(place) or len(offsets) != len(shape):
            raise ValueError(f"'{name}' has a piece at {place!r}")
        if info.field("transform_descriptors"):
            raise CheckpointError(f"'{name}' in '{file}' is compressed, expected plain tensors")
        region = tuple((start, start + size) for start, size in zip(offsets, sizes, strict=True))
        pieces.append(_Piece(region, member(file.parent, info.field("relative_path"), file), *place))
    return TensorInfo(shape, dtype.name.removeprefix("torch.")), pieces


def _sizes(size: Any) -> tuple[int, ...]:
    """Return the numbers of a torch.Size."""
    values = size.arguments[0] if isinstance(size, Record) and size.kind == "torch.Size" else None
    if not are_sizes(values):
        raise ValueError(f"{values!r}, expected sizes")
    return tuple(values)


def _check_cover(name: str, boxes: list[Box], shape: tuple[int, ...], axis: int = 0) -> None:
    """Refuse pieces that do not tile the tensor: along every axis their ranges are equal, or meet end to end."""
    if axis == len(shape):
        if len(boxes) != 1:
            raise CheckpointError(f"'{name}' has {len(boxes)} pieces at the same place")
        return
    groups: dict[tuple[int, int], list[Box]] = defaultdict(list)
    for piece in boxes:
        groups[piece[axis]].append(piece)
    position = 0
    for start, stop in sorted(groups):
        if start != position:
            kind = "overlap" if start < position else "leave a hole"
            raise CheckpointError(f"the pieces of '{name}' {kind} at {start} in dimension {axis}")
        _check_cover(name, groups[start, stop], shape, axis + 1)
        position = stop
    if position != shape[axis]:
        raise CheckpointError(
            f"the pieces of '{name}' end at {position} in dimension {axis}, expected {shape[axis]}"
        )


def _by_row(pieces: list[_Piece]) -> tuple[list[int], list[list[_Piece]]]:
    """Return the pieces grouped by where they begin in the first dimension. `_check_cover` found them disjoint."""
    groups: dict[int, list[_Piece]] = defaultdict(list)
    for piece in pieces:
        groups[piece.region[0][0] if piece.region else 0].append(piece)
    starts = sorted(groups)
    return starts, [groups[start] for start in starts]


def _within(region: Box, outer: Box) -> tuple[slice, ...]:
    return tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(region, outer, strict=True))
