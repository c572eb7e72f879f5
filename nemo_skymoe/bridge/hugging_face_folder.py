"""A Hugging Face folder as Bridge's conversion reads one: every tensor under the released names, one at a time."""

from pathlib import Path

import torch
from torch import Tensor

from nemo_skymoe.checkpoint.hugging_face.names import chunks
from nemo_skymoe.checkpoint.hugging_face.opening import open_hugging_face
from nemo_skymoe.checkpoint.tensors.mapping import assemble
from nemo_skymoe.checkpoint.tensors.target import stored_dtypes


class FolderState:
    """The tensors of a folder by their released names, whichever of the layouts it has.

    Args:
        folder: With config.json and safetensors; its pickles and its code are not touched.

    Raises:
        ConfigurationError: The tensors are not those of the model that the configuration describes.
    """

    def __init__(self, folder: Path) -> None:
        self._weights, _ = open_hugging_face(folder)
        self._chunks = {chunk.tensor: chunk for chunk in chunks(self._weights.architecture)}
        self._dtypes = stored_dtypes(self._chunks.values(), self._weights)

    @property
    def source(self) -> "FolderState":
        """What Bridge asks for the names."""
        return self

    def get_all_keys(self) -> list[str]:
        """Return the names of all tensors."""
        return list(self._chunks)

    def __getitem__(self, name: str) -> Tensor:
        return assemble(self._chunks[name], self._weights, getattr(torch, self._dtypes[name]))
