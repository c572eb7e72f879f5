"""A storage seen differently: the files stay the same, some tensors are hidden or appear as something else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_skymoe.checkpoint.tensors.model import TensorInfo
from nemo_skymoe.checkpoint.tensors.regions import Extent, FileStorage

if TYPE_CHECKING:
    from torch import Tensor


class StorageView:
    """Another storage, of which only `tensors` are seen."""

    def __init__(self, storage: FileStorage, tensors: Mapping[str, TensorInfo]):
        self.storage, self.folder, self.files = storage, storage.folder, storage.files
        self.tensors = tensors

    def extents(self, file: Path) -> Sequence[Extent]:
        """Return the extents of everything in the file, seen or not: its checksum covers all of it."""
        return self.storage.extents(file)

    def read(self, name: str, index: tuple[int, ...] = (), rows: tuple[int, int] | None = None) -> Tensor:
        """Return the same as from the storage itself."""
        return self.storage.read(name, index, rows)


class Renamed(StorageView):
    """Another storage, some tensors of which have new names; `names` has them by the old ones."""

    def __init__(self, storage: FileStorage, names: Mapping[str, str]):
        super().__init__(storage, {names.get(name, name): info for name, info in storage.tensors.items()})
        self._stored = {new: old for old, new in names.items()}

    def read(self, name: str, index: tuple[int, ...] = (), rows: tuple[int, int] | None = None) -> Tensor:
        """Return the same as from the storage itself, under the new name."""
        return super().read(self._stored.get(name, name), index, rows)
