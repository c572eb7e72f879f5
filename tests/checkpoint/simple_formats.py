"""Two formats of the tests' own, as tables: every tensor alone, and fused, stacked and padded as Megatron does."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from nemo_skymoe.architecture import Architecture
from nemo_skymoe.checkpoint.hugging_face.storage import SafetensorsStorage
from nemo_skymoe.checkpoint.hugging_face.target import HuggingFaceTarget
from nemo_skymoe.checkpoint.job.conversion import run
from nemo_skymoe.checkpoint.tensors.mapping import Chunk, Part, StoredWeights
from nemo_skymoe.checkpoint.tensors.model import Key, Weights, key_shape, model_keys
from nemo_skymoe.checkpoint.tensors.regions import FileStorage
from nemo_skymoe.checkpoint.tensors.target import Target, stored_dtypes
from nemo_skymoe.checkpoint.torch_dist.storage import TorchDistStorage
from nemo_skymoe.checkpoint.torch_dist.target import TorchDistTarget
from tests.checkpoint.fakes import DictWeights

TINY = Architecture(1, 16, 24, 2, vocab_size=50, num_moe_experts=2)
EXTRA_STATES = ("module.decoder.layers.mlp.linear_fc1._extra_state/shard_0_1",)
PADDED = 64
JOB = {"command": "convert SRC DST", "seed": 7}


class Interrupting(DictWeights):
    """Weights that stop being readable after some reads."""

    def __init__(self, weights: DictWeights, reads: int, what: BaseException | Callable[[], Any]):
        super().__init__(weights.architecture, weights.values)
        self.reads, self.what = reads, what

    def read(self, key: Key) -> torch.Tensor:
        self.reads -= 1
        if self.reads == 0:
            if isinstance(self.what, BaseException):
                raise self.what
            self.what()
        return super().read(key)


def whole(key: Key, rows: int) -> tuple[Part, ...]:
    return (Part(key, 0, rows),)


def separate(architecture: Architecture) -> list[Chunk]:
    """Each tensor by itself."""
    shapes = {key: key_shape(architecture, key) for key in model_keys(architecture)}
    return [Chunk(_name(key), shape, whole(key, shape[0])) for key, shape in shapes.items()]


def stacked(architecture: Architecture) -> list[Chunk]:
    """Experts and layers stacked, gate and up fused, the vocabulary padded."""
    chunks = []
    layers, experts = architecture.num_layers, architecture.num_moe_experts or 0
    for key in model_keys(architecture):
        shape = key_shape(architecture, key)
        place = key.layer or 0, key.expert or 0
        if key.kind in ("embedding", "output"):
            parts = (*whole(key, shape[0]), Part(None, 0, PADDED - shape[0]))
            chunks.append(Chunk(f"module.{key.kind}", (PADDED, shape[1]), parts))
        elif key.kind == "gate":
            up = Key("up", key.layer, key.expert)
            shape = (layers, experts, 2 * shape[0], shape[1])
            parts = (*whole(key, shape[2] // 2), *whole(up, shape[2] // 2))
            chunks.append(Chunk("module.layers.experts.fc1", shape, parts, place))
        elif key.expert is not None and key.kind == "down":
            parts = whole(key, shape[0])
            shape = (layers, experts, *shape)
            chunks.append(Chunk("module.layers.experts.fc2", shape, parts, place))
        elif key.layer is not None and key.expert is None:
            parts = whole(key, shape[0])
            chunks.append(Chunk(f"module.layers.{key.kind}", (layers, *shape), parts, (key.layer,)))
        elif key.layer is None:
            chunks.append(Chunk(f"module.{key.kind}", shape, whole(key, shape[0])))
    return chunks


def target(kind: str, weights: Weights, shard_bytes: int = 4000) -> Target:
    """ "hf": shards of separate tensors; "torch_dist": a file for each piece of the stacked ones."""
    if kind == "hf":
        chunks = separate(weights.architecture)
        extras = {"config.json": b"{}\n", "code/model.py": b"pass\n"}
        return HuggingFaceTarget(chunks, stored_dtypes(chunks, weights), shard_bytes, extras)
    chunks = stacked(weights.architecture)
    extras = {"context/model.yaml": b"a: 1\n"}
    return TorchDistTarget(chunks, stored_dtypes(chunks, weights), EXTRA_STATES, extras)


def write(
    kind: str, weights: Weights, folder: Path, sources: Sequence[FileStorage] = (), **options: Any
) -> dict[str, Any]:
    """Run the job that writes `weights` as a folder of this kind."""
    job = options.pop("job", JOB)
    return run(weights, target(kind, weights), folder, job=job, sources=sources, **options)


def open_folder(kind: str, folder: Path, architecture: Architecture = TINY) -> tuple[StoredWeights, Any]:
    """The weights in a folder of this kind, and its storage."""
    storage = SafetensorsStorage(folder) if kind == "hf" else TorchDistStorage(folder)
    table = separate(architecture) if kind == "hf" else stacked(architecture)
    return StoredWeights(storage, architecture, table), storage


def flip(file: Path, position: int) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= 1
    file.write_bytes(data)


def _name(key: Key) -> str:
    return ".".join(str(part) for part in (key.kind, key.layer, key.expert) if part is not None)
