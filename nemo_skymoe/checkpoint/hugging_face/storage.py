"""Folders of weights as Hugging Face lays them out: safetensors, or what `torch.save` writes, read as data alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_skymoe.checkpoint import foreign
from nemo_skymoe.checkpoint.hugging_face.safetensors_header import LONGEST_HEADER, parse_json, read_header
from nemo_skymoe.checkpoint.tensors.buffers import empty
from nemo_skymoe.checkpoint.tensors.mapping import listed
from nemo_skymoe.checkpoint.tensors.model import TensorInfo
from nemo_skymoe.checkpoint.tensors.regions import (
    DTYPE_SIZES,
    Extent,
    box,
    box_shape,
    first_element,
    tensor_bytes,
)
from nemo_skymoe.checkpoint.tensors.saved_tensor import ARCHIVE, SavedTensor, find_tensors
from nemo_skymoe.durable.errors import CheckpointError
from nemo_skymoe.durable.reading import member, read_bytes, read_into

if TYPE_CHECKING:
    from torch import Tensor

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED = "pytorch_model.bin"


@dataclass(frozen=True)
class _Kind:
    """A kind of files with weights: the name of a single one, that of the index of several, and theirs."""

    single: str
    index: str
    numbered: re.Pattern[str]
    read: Callable[[Path], dict[str, SavedTensor]]
    """Returns the tensors of a file by name."""

    def has(self, name: str) -> bool:
        """Say whether a file of this name holds weights, or the index of some."""
        return name in (self.single, self.index) or self.numbered.fullmatch(name) is not None


class HuggingFaceStorage:
    """The tensors of a folder: of one file with weights, or of the shards that an index names.

    Raises:
        CheckpointError: A file is missing, truncated, or not what its header or the index says.
    """

    def __init__(self, folder: Path, kind: _Kind):
        self.folder = Path(folder)
        index = self.folder / kind.index
        shards = _shards(self.folder, kind)
        self.files = (*shards, index) if index.is_file() else tuple(shards)
        self._places: dict[str, tuple[Path, SavedTensor]] = {}
        for shard, indexed in shards.items():
            places = kind.read(shard)
            _check_index(shard, kind.index, indexed, places.keys())
            twice = self._places.keys() & places.keys()
            if twice:
                raise CheckpointError(f"'{shard}' holds '{min(twice)}', as another shard does")
            self._places |= {name: (shard, place) for name, place in places.items()}
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(place.shape, place.dtype) for name, (_, place) in self._places.items()
        }

    def extents(self, file: Path) -> list[Extent]:
        """Return the tensors of one file by position; where several lie in the same place, the first of them."""
        held = sorted(
            (place.start, place.stop, name, place.dtype)
            for name, (its_file, place) in self._places.items()
            if its_file == file
        )
        extents: list[Extent] = []
        for start, stop, name, dtype in held:
            if not extents or start >= extents[-1].stop:
                extents.append(Extent(name, dtype, start, stop))
        return extents

    def read(self, name: str, index: tuple[int, ...] = (), rows: tuple[int, int] | None = None) -> Tensor:
        """Read as `Storage.read` says."""
        file, place = self._places[name]
        region = box(place.shape, index, rows)
        tensor = empty(box_shape(region, index), place.dtype)
        start = place.start + first_element(region, place.shape) * DTYPE_SIZES[place.dtype]
        read_into(file, start, tensor_bytes(tensor))
        return tensor


class SafetensorsStorage(HuggingFaceStorage):
    """`model.safetensors`, or the shards that `model.safetensors.index.json` names. Reads headers only.

    Raises:
        CheckpointError: As for every storage, or the weights are pickles, which a library would unpickle.
    """

    def __init__(self, folder: Path):
        if (kind := _kind_of(Path(folder))) is _PICKLED:
            raise CheckpointError(
                f"'{folder}' has its weights in pickles ('{kind.single}'): make safetensors of them with skymoe convert"
                f" {folder} FOLDER --to hf"
            )
        super().__init__(folder, kind)


def open_storage(folder: Path) -> HuggingFaceStorage:
    """Open the tensors of a folder: its safetensors or, without any, its `pytorch_model.bin` or the shards of it.

    The latter are pickles. Their description is read as data, and their tensors from where it says that they are:
    nothing is imported, built or called.

    Raises:
        CheckpointError: As for every storage; a pickle refers to anything but tensors.
    """
    return HuggingFaceStorage(folder, _kind_of(Path(folder)))


def _kind_of(folder: Path) -> _Kind:
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    safetensors, pickled = (any(map(kind.has, names)) for kind in (_SAFETENSORS, _PICKLED))
    return _PICKLED if pickled and not safetensors else _SAFETENSORS


def _read_pickled(file: Path) -> dict[str, SavedTensor]:
    if read_bytes(file, 0, min(len(ARCHIVE), file.stat().st_size)) != ARCHIVE:
        raise CheckpointError(
            f"'{file}' is not an archive as torch.save writes since torch 1.6: load it with the torch that wrote it, and"
            " save the model as safetensors"
        )
    return find_tensors(file)


_SAFETENSORS = _Kind(SINGLE, INDEX, re.compile(r"model-\d{5}-of-\d{5}\.safetensors"), read_header)
_PICKLED = _Kind(
    PICKLED, f"{PICKLED}.index.json", re.compile(r"pytorch_model-\d{5}-of-\d{5}\.bin"), _read_pickled
)


def _shards(folder: Path, kind: _Kind) -> dict[Path, set[str] | None]:
    """Return the files of a model by name, each with the tensors that the index says it holds, if there is one."""
    if not folder.is_dir():
        raise CheckpointError(f"'{folder}' is not a folder")
    names = sorted(path.name for path in folder.iterdir())
    if kind.index not in names:
        if kind.single in names:
            return {member(folder, kind.single, folder): None}
        raise CheckpointError(_what_is_missing(folder, names, kind))
    if kind.single in names:
        raise CheckpointError(
            f"'{folder}' has both '{kind.single}' and '{kind.index}': delete the one that is stale"
        )
    index = member(folder, kind.index, folder)
    if (size := index.stat().st_size) > LONGEST_HEADER:
        raise CheckpointError(f"'{index}' is {size:,} bytes, expected at most {LONGEST_HEADER:,}")
    weight_map = parse_json(read_bytes(index, 0, size), index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"'{index}' has no weight_map")
    shards: dict[Path, set[str] | None] = {}
    for shard in sorted(set(map(str, weight_map.values()))):
        shards[member(folder, shard, index)] = {name for name, file in weight_map.items() if file == shard}
    strays = {name for name in names if kind.numbered.fullmatch(name)} - {shard.name for shard in shards}
    if strays:
        raise CheckpointError(
            f"'{folder / min(strays)}' is not in '{kind.index}': delete it if it is left from another save"
        )
    return shards


def _what_is_missing(folder: Path, names: list[str], kind: _Kind) -> str:
    foreign.refuse_folder(folder, is_model=False)
    shards = [name for name in names if name.endswith(Path(kind.single).suffix)]
    found = (
        f"'{shards[0]}' but no '{kind.index}'" if shards else f"neither '{kind.single}' nor '{kind.index}'"
    )
    return f"'{folder}' has {found}: expected a complete Hugging Face model"


def _check_index(shard: Path, index: str, indexed: set[str] | None, held: Any) -> None:
    if indexed is None:
        return
    problems = [f"'{name}' is in the index only" for name in sorted(indexed - held)]
    problems += [f"'{name}' is not in the index" for name in sorted(held - indexed)]
    if problems:
        raise CheckpointError(f"'{shard}' and '{index}' differ: {listed(problems)}")
