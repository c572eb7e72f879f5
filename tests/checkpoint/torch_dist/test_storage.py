"""`torch_dist` checkpoints against PyTorch and Megatron, which write them, and everything that is refused."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter, save
from torch.distributed.checkpoint.metadata import Metadata

from nemo_skymoe.checkpoint.torch_dist.storage import TorchDistStorage
from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.patches import cpu_runtime
from nemo_skymoe.ranks import run_ranks
from tests.checkpoint.fuzz import damaged, must_be_read_or_refused

LAYERS, EXPERTS = 4, 4
SHAPES = {
    "module.embedding.weight": (12, 8),
    "module.layers.fc1.weight": (LAYERS, 12, 8),
    "module.layers.fc2.weight": (LAYERS, 8, 12),
    "module.layers.experts.fc1.weight": (LAYERS, EXPERTS, 12, 8),
    "module.layers.norm.weight": (LAYERS, 8),
    "module.norm.weight": (8,),
}
SPLITS = {"module.embedding.weight": 0, "module.layers.fc1.weight": 1, "module.layers.fc2.weight": 2}
"""The dimension that tensor parallelism splits."""


def tensors(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}


def save_megatron(folder: Path, pipeline: int, dtype: torch.dtype) -> None:
    """On every rank: its layers, its part of each matrix, its experts, an optimizer's state and an extra state."""
    cpu_runtime.apply()
    torch.distributed.init_process_group("gloo")
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    parallel_state.initialize_model_parallel()
    tensor = world // pipeline
    stage, part = divmod(rank, tensor)
    state: dict[str, Any] = {}
    for name, full in tensors(dtype).items():
        if ".layers." not in name:
            split = [(0, part, tensor)] if name in SPLITS else []
            local = full.chunk(tensor)[part] if split else full
            replica = (0, 0, stage) if split else (0, 0, rank)
            state[name] = ShardedTensor.from_rank_offsets(name, local.clone(), *split, replica_id=replica)
            continue
        for layer in range(stage * LAYERS // pipeline, (stage + 1) * LAYERS // pipeline):
            offsets, local, axes, replica = [(0, layer, LAYERS)], full[layer], 1, (0, 0, part)
            if "experts" in name:
                for expert in range(part * EXPERTS // tensor, (part + 1) * EXPERTS // tensor):
                    place = (*offsets, (1, expert, EXPERTS))
                    state[f"{name}.{layer}.{expert}"] = ShardedTensor.from_rank_offsets(
                        name, local[expert].clone(), *place, prepend_axis_num=2
                    )
                continue
            if name in SPLITS:
                axis = SPLITS[name]
                offsets.append((axis, part, tensor))
                local, replica = local.chunk(tensor, axis - 1)[part], (0, 0, 0)
            state[f"{name}.{layer}"] = ShardedTensor.from_rank_offsets(
                name, local.clone(), *offsets, prepend_axis_num=axes, replica_id=replica
            )
    key = "optimizer.state.exp_avg"
    state["optimizer"] = ShardedTensor.from_rank_offsets(key, torch.ones(4), (0, rank, world))
    state["extra"] = ShardedObject("module.layers.fc1._extra_state", [None], (world,), (rank,))
    dist_checkpointing.save(state, str(folder))


@pytest.mark.parametrize(
    ("world", "pipeline", "dtype"),
    [(1, 1, torch.float16), (4, 2, torch.bfloat16), (2, 1, torch.float32), (4, 4, torch.float32)],
)
def test_reads_what_megatron_saved_at_any_parallel_sizes(
    world: int, pipeline: int, dtype: torch.dtype, tmp_path: Path
):
    run_ranks(save_megatron, world, tmp_path, pipeline, dtype)
    storage = TorchDistStorage(tmp_path)
    assert {name: info.shape for name, info in storage.tensors.items()} == SHAPES
    for name, tensor in tensors(dtype).items():
        assert torch.equal(storage.read(name), tensor)
        assert torch.equal(storage.read(name, (), (1, 3)), tensor[1:3])
        if tensor.dim() > 1:
            assert torch.equal(storage.read(name, (3,)), tensor[3])
            assert torch.equal(storage.read(name, (2,), (1, 4)), tensor[2, 1:4])
        if tensor.dim() == 4:
            assert torch.equal(storage.read(name, (1, 2), (3, 9)), tensor[1, 2, 3:9])


def save_torch(folder: Path, stored: dict[str, Tensor] | None = None) -> None:
    """By PyTorch itself, in one process."""
    save(dict(stored or tensors()), storage_writer=FileSystemWriter(folder), no_dist=True)
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')


def change_metadata(folder: Path, change: Callable[[Metadata], Any]) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_torch(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float64, torch.int64, torch.bool]
)
def test_reads_what_pytorch_saved(dtype: torch.dtype, tmp_path: Path):
    stored = {
        "module.a": torch.arange(24).reshape(4, 6).to(dtype),
        "module.number": torch.tensor(1).to(dtype),
    }
    save_torch(tmp_path, stored)
    storage = TorchDistStorage(tmp_path)
    for name, tensor in stored.items():
        assert storage.read(name).dtype == dtype
        assert torch.equal(storage.read(name).float(), tensor.float())


def test_extents_are_where_the_bytes_are(folder: Path):
    storage = TorchDistStorage(folder)
    data = storage.files[0].read_bytes()
    found = {extent.name: data[extent.start : extent.stop] for extent in storage.extents(storage.files[0])}
    assert found == {name: tensor.numpy().tobytes() for name, tensor in tensors().items()}


def test_megatron_lm_has_names_without_prefix(tmp_path: Path):
    plain = {name.removeprefix("module."): tensor for name, tensor in tensors().items()}
    save_torch(
        tmp_path, plain | {"optimizer.state.exp_avg": torch.ones(3), "chained_0.optimizer.x": torch.ones(2)}
    )
    assert TorchDistStorage(tmp_path).tensors.keys() == plain.keys()


class Exploit:
    def __init__(self, command: str):
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


@pytest.mark.parametrize("place", ["whole", "planner"])
def test_runs_no_code_of_the_metadata(place: str, folder: Path):
    exploit = Exploit(f"touch {folder}/owned")
    if place == "whole":
        (folder / ".metadata").write_bytes(pickle.dumps(exploit))
    else:
        change_metadata(folder, lambda metadata: setattr(metadata, "planner_data", exploit))
    with pytest.raises(ConfigurationError, match=r"refers to '(posix|os|nt)\.system'"):
        TorchDistStorage(folder)
    assert not (folder / "owned").exists()


def test_runs_no_code_of_a_tensor(folder: Path):
    place = pickle.loads((folder / ".metadata").read_bytes()).storage_data
    info = max(place.values(), key=lambda info: info.offset)
    with (folder / info.relative_path).open("r+b") as file:
        file.truncate(info.offset)
        file.seek(info.offset)
        torch.save(Exploit(f"touch {folder}/owned"), file)
        info.length = file.tell() - info.offset
    change_metadata(folder, lambda metadata: setattr(metadata, "storage_data", place))
    storage = TorchDistStorage(folder)
    with pytest.raises(ConfigurationError, match=r"system"):
        [storage.read(name) for name in storage.tensors]
    assert not (folder / "owned").exists()


def first_chunk(name: str, **fields: Any) -> Callable[[Metadata], Any]:
    def change(metadata: Metadata) -> None:
        for field, value in fields.items():
            setattr(metadata.state_dict_metadata[name].chunks[0], field, value)

    return change


def every_place(**fields: Any) -> Callable[[Metadata], Any]:
    def change(metadata: Metadata) -> None:
        for info in metadata.storage_data.values():
            for field, value in fields.items():
                setattr(info, field, value)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (every_place(relative_path="../elsewhere.distcp"), "in the same folder"),
        (every_place(relative_path="/etc/hostname"), "in the same folder"),
        (every_place(relative_path="missing.distcp"), "cannot be opened"),
        (every_place(length=10**12), "is truncated"),
        (every_place(offset=-5), "has a piece at"),
        (every_place(offset=3), "no readable tensor|is truncated"),
        (every_place(transform_descriptors=["zstd"]), "is compressed"),
        (first_chunk("module.norm.weight", sizes=torch.Size([6])), "end at 6 in dimension 0, expected 8"),
        (first_chunk("module.norm.weight", sizes=torch.Size([9])), "end at 9"),
        (lambda metadata: metadata.state_dict_metadata["module.norm.weight"].chunks.clear(), "end at 0"),
        (
            lambda metadata: metadata.state_dict_metadata["module.norm.weight"].chunks.append(
                metadata.state_dict_metadata["module.norm.weight"].chunks[0]
            ),
            "2 pieces at the same place",
        ),
        (lambda metadata: metadata.storage_data.clear(), "is damaged"),
        (lambda metadata: metadata.state_dict_metadata.clear(), "no tensor of a model"),
        (lambda metadata: setattr(metadata, "state_dict_metadata", 7), "is damaged"),
    ],
)
def test_refuses_metadata_that_lies(change: Callable[[Metadata], Any], message: str, folder: Path):
    change_metadata(folder, change)
    with pytest.raises(ConfigurationError, match=message):
        storage = TorchDistStorage(folder)
        [storage.read(name) for name in storage.tensors]


def test_refuses_pieces_that_leave_a_hole(tmp_path: Path):
    run_ranks(save_megatron, 2, tmp_path, 1, torch.float32)
    name = "module.layers.experts.fc1.weight"
    change_metadata(tmp_path, lambda metadata: metadata.state_dict_metadata[name].chunks.pop(5))
    with pytest.raises(ConfigurationError, match=r"pieces of 'module.layers.experts.fc1.weight' (leave|end)"):
        TorchDistStorage(tmp_path)


def test_refuses_another_data_type_or_shape_than_the_metadata_has(folder: Path):
    def change(metadata: Metadata) -> None:
        metadata.state_dict_metadata["module.norm.weight"].properties.dtype = torch.float64

    change_metadata(folder, change)
    with pytest.raises(ConfigurationError, match=r"is float32 \[8\], expected float64 \[8\]"):
        TorchDistStorage(folder).read("module.norm.weight")


@pytest.mark.parametrize("kept", [0, 100, -1])
def test_refuses_a_truncated_file(kept: int, folder: Path):
    file = TorchDistStorage(folder).files[0]
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ConfigurationError, match="is truncated"):
        TorchDistStorage(folder)


def test_refuses_what_is_no_checkpoint(folder: Path):
    (folder / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    with pytest.raises(ConfigurationError, match="sharded_backend 'zarr'"):
        TorchDistStorage(folder)
    (folder / "metadata.json").unlink()
    with pytest.raises(ConfigurationError, match=r"no metadata\.json: .*sharded checkpoint of FSDP"):
        TorchDistStorage(folder)
    (folder / ".metadata").unlink()
    with pytest.raises(ConfigurationError, match="no torch_dist checkpoint"):
        TorchDistStorage(folder)


def test_fuzzed_metadata(tmp_path: Path):
    save_torch(tmp_path, {"module.a": torch.ones(2, 3), "module.b": torch.ones(4, dtype=torch.bfloat16)})
    original, random = (tmp_path / ".metadata").read_bytes(), Random(13)

    def read() -> None:
        storage = TorchDistStorage(tmp_path)
        for name, info in storage.tensors.items():
            assert tuple(storage.read(name).shape) == info.shape

    for _ in range(400):
        (tmp_path / ".metadata").write_bytes(damaged(original, random))
        must_be_read_or_refused(read)


def test_fuzzed_tensors(tmp_path: Path):
    save_torch(tmp_path, {"module.a": torch.ones(2, 3), "module.b": torch.ones(4, dtype=torch.bfloat16)})
    storage, random = TorchDistStorage(tmp_path), Random(14)
    file = storage.files[0]
    original = file.read_bytes()
    for _ in range(400):
        file.write_bytes(damaged(original, random))
        must_be_read_or_refused(lambda: [TorchDistStorage(tmp_path).read(name) for name in storage.tensors])


def test_a_memo_of_a_billion_entries_is_not_made(folder: Path):
    (folder / ".metadata").write_bytes(b"\x80\x02Nr\xff\xff\xff\x7f.")  # None, LONG_BINPUT 2**31 - 1, STOP
    must_be_read_or_refused(lambda: TorchDistStorage(folder))
