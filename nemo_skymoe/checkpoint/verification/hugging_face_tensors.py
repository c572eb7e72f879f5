"""A Hugging Face folder's tensors by meaning, read with safetensors' own reader, or with torch's for tensors alone."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nemo_skymoe.architecture import Architecture
from nemo_skymoe.checkpoint.verification.bits import different
from nemo_skymoe.durable.errors import CheckpointError

_EMBEDDING, _HEAD = "model.embed_tokens", "lm_head"
_EIGHT_BITS = (torch.float8_e4m3fn, torch.float8_e5m2)
_BESIDE_WEIGHTS = ("inv_freq", "_scale", "_scale_inv")
_PICKLE = ".bin"


class HuggingFaceModel:
    """Llama's names for a dense model; the release's or its authors' for an MoE. 8 bits are read as bfloat16.

    Args:
        folder: With `model.safetensors.index.json`, a single safetensors file, or the same of `pytorch_model.bin`. Those
            are pickles: check the folder with `open_storage`, which refuses all but tensors, before it is opened here.
        architecture: It says whether embedding and head are tied, so that either may be stored, or both.

    Raises:
        CheckpointError: The index and the files disagree.
    """

    def __init__(self, folder: Path, architecture: Architecture):
        self.folder = folder
        self._tied = architecture.tied_embeddings
        self._files = _placed(folder)
        self._read: set[str] = {name for name in self._files if name.endswith(_BESIDE_WEIGHTS)}

    @property
    def has_eight_bits(self) -> bool:
        """Whether some weights are stored in 8 bits, each with its scales beside it."""
        return any(name.endswith((".weight_scale", ".weight_scale_inv")) for name in self._files)

    @property
    def head_stands_for_both(self) -> bool:
        """Whether the embedding is tied to the head, and the head is the one that is stored."""
        return self._tied and f"{_EMBEDDING}.weight" not in self._files and f"{_HEAD}.weight" in self._files

    def tensor(self, kind: str, layer: int | None = None, expert: int | None = None) -> Tensor:
        """Return one matrix or vector.

        Raises:
            KeyError: The folder has none of that name.
            CheckpointError: It is a tied embedding, and stored twice with different values.
        """
        if layer is None and kind == "embedding" and self._tied:
            return self._tied_embedding()
        if layer is None:
            outside = {"embedding": _EMBEDDING, "final_norm": "model.norm", "output": _HEAD}
            return self._stored(outside[kind])
        return self._of_layer(f"model.layers.{layer}.", kind, expert)

    def _tied_embedding(self) -> Tensor:
        if not {f"{_EMBEDDING}.weight", f"{_HEAD}.weight"} <= self._files.keys():
            return self._stored(_EMBEDDING, _HEAD)
        embedding, head = self._stored(_EMBEDDING), self._stored(_HEAD)
        if difference := different(embedding, head):
            raise CheckpointError(
                f"'{_HEAD}.weight' in '{self.folder}' differs from '{_EMBEDDING}.weight', to which it is tied: {difference}"
            )
        return embedding

    def _of_layer(self, layer: str, kind: str, expert: int | None) -> Tensor:
        theirs = f"{layer}mlp.moe."
        released = f"{layer}block_sparse_moe."
        if kind == "router":
            return self._stored(f"{released}gate", f"{theirs}gate.wg", f"{layer}mlp.gate")
        if expert is not None and f"{theirs}experts.experts.{expert}.down_proj.weight" in self._files:
            fused = {"gate": 0, "up": 1}
            if kind in fused:
                return self._stored(f"{theirs}experts.experts.{expert}.up_proj").chunk(2)[fused[kind]]
            return self._stored(f"{theirs}experts.experts.{expert}.down_proj")
        if expert is not None:
            number = {"gate": 1, "down": 2, "up": 3}[kind]
            return self._stored(
                f"{released}experts.{expert}.w{number}", f"{layer}mlp.experts.{expert}.{kind}_proj"
            )
        if kind in ("gate", "up", "down"):
            return self._stored(f"{layer}mlp.{kind}_proj")
        if kind in ("query_norm", "key_norm"):
            return self._stored(f"{layer}self_attn.{kind[0]}_norm")
        if kind.endswith("_bias"):
            return self._vector(f"{layer}self_attn.{kind[0]}_proj.bias")
        if kind.endswith("_norm"):
            where = "input" if kind == "attention_norm" else "post_attention"
            return self._stored(f"{layer}{where}_layernorm")
        letter = "o" if kind == "attention_output" else kind[0]
        return self._stored(f"{layer}self_attn.{letter}_proj")

    def _stored(self, *names: str) -> Tensor:
        for name in names:
            weight = f"{name}.weight"
            if weight in self._files:
                self._read.add(weight)
                tensor = self._open(weight)
                return self._widened(weight, tensor) if tensor.dtype in _EIGHT_BITS else tensor
        raise KeyError(f"{names[0]}.weight")

    def _vector(self, name: str) -> Tensor:
        if name not in self._files:
            raise KeyError(name)
        self._read.add(name)
        return self._open(name)

    def _widened(self, weight: str, tensor: Tensor) -> Tensor:
        if f"{weight}_scale" in self._files:
            return (tensor.float() * self._open(f"{weight}_scale").float().item()).bfloat16()
        quantization = json.loads((self.folder / "config.json").read_text())["quantization_config"]
        scales = self._open(f"{weight}_scale_inv").float()
        blocks = torch.ones(quantization["weight_block_size"])
        rows, columns = tensor.shape
        return (tensor.float() * torch.kron(scales, blocks)[:rows, :columns]).bfloat16()

    def _open(self, name: str) -> Tensor:
        with _opened(self.folder / self._files[name]) as tensors:
            return tensors[name]

    def problems(self) -> list[str]:
        """Return the tensors that nobody asked for."""
        return [f"'{name}' has no place in the model" for name in sorted(self._files.keys() - self._read)]


class _Safetensors(Mapping[str, Tensor]):
    """The tensors of a safetensors file, each read when it is asked for."""

    def __init__(self, file: Any):
        self._file, self._names = file, list(file.keys())

    def __getitem__(self, name: str) -> Tensor:
        return self._file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@contextmanager
def _opened(file: Path) -> Iterator[Mapping[str, Tensor]]:
    """Open a file of weights, of which nothing but what is asked for is read."""
    try:
        if file.suffix != _PICKLE:
            with safe_open(file, framework="pt") as opened:
                yield _Safetensors(opened)
            return
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, SafetensorError, RuntimeError) as reason:
        form = "weights" if file.suffix == _PICKLE else "safetensors"
        raise CheckpointError(f"'{file}' cannot be read as {form}: {reason}") from None
    except UnpicklingError:  # at length, torch would say how to load it unsafely
        raise CheckpointError(f"'{file}' holds other things than tensors") from None
    yield tensors


def _placed(folder: Path) -> dict[str, str]:
    """Return the file of every tensor."""
    pattern = "*.safetensors" if any(folder.glob("*.safetensors")) else f"pytorch_model*{_PICKLE}"
    index = folder / (
        "model.safetensors.index.json" if pattern == "*.safetensors" else "pytorch_model.bin.index.json"
    )
    indexed = _weight_map(index) if index.is_file() else None
    files = sorted(set(indexed.values()) if indexed else (path.name for path in folder.glob(pattern)))
    placed: dict[str, str] = {}
    for file in files:
        with _opened(folder / file) as tensors:
            placed |= dict.fromkeys(tensors, file)
    if indexed is not None and placed != indexed:
        wrong = sorted(set(placed.items()) ^ set(indexed.items()))
        raise CheckpointError(f"'{index}' and the files disagree on '{wrong[0][0]}'")
    return placed


def _weight_map(index: Path) -> dict[str, str]:
    """Tensors and the names of files beside the index."""
    try:
        indexed = json.loads(index.read_text())["weight_map"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as reason:
        raise CheckpointError(f"'{index}' has no weight_map that can be read: {reason!r}") from None
    if not isinstance(indexed, dict):
        raise CheckpointError(f"'{index}' has the weight_map {indexed!r:.100}, expected names of tensors")
    for file in indexed.values():
        # By its text alone: whoever made the folder decides where a link leads, but an index stays inside.
        if not isinstance(file, str) or not file or file in (".", "..") or "/" in file or "\0" in file:
            raise CheckpointError(f"'{index}' names the file {file!r}, expected a file in the same folder")
    return indexed
