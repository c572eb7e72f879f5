"""What is written, read by those who will: safetensors, transformers, PyTorch and Megatron."""

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedObject
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, load
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from transformers import LlamaForCausalLM

from nemo_skymoe.architecture import Architecture
from nemo_skymoe.checkpoint.hugging_face.storage import INDEX, SINGLE, SafetensorsStorage
from nemo_skymoe.checkpoint.hugging_face.target import HuggingFaceTarget
from nemo_skymoe.checkpoint.job.conversion import run
from nemo_skymoe.checkpoint.tensors.mapping import StoredWeights, assemble
from nemo_skymoe.checkpoint.tensors.model import Key
from nemo_skymoe.checkpoint.tensors.target import check_complete, stored_dtypes
from nemo_skymoe.checkpoint.torch_dist.storage import TorchDistStorage
from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.patches import cpu_runtime
from nemo_skymoe.ranks import run_ranks
from tests.checkpoint.fakes import random_weights
from tests.checkpoint.hf_models import llama
from tests.checkpoint.simple_formats import (
    EXTRA_STATES,
    JOB,
    TINY,
    open_folder,
    separate,
    stacked,
    target,
    write,
)

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def expected(kind: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The stored tensors by name, put together here."""
    weights = random_weights(TINY, dtype)
    table = separate(TINY) if kind == "hf" else stacked(TINY)
    tensors = {chunk.tensor: torch.zeros(chunk.shape, dtype=dtype) for chunk in table}
    for chunk in table:
        tensors[chunk.tensor][chunk.index] = assemble(chunk, weights, dtype)
    return tensors


@pytest.mark.parametrize("dtype", DTYPES)
def test_safetensors_reads_the_shards(dtype: torch.dtype, tmp_path: Path):
    write("hf", random_weights(TINY, dtype), tmp_path / "out")
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    tensors = expected("hf", dtype)
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    for name, tensor in tensors.items():
        with safetensors.safe_open(tmp_path / "out" / index["weight_map"][name], "pt") as shard:
            assert shard.metadata() == {"format": "pt"}
            assert torch.equal(shard.get_tensor(name), tensor)


def test_shards_are_filled_in_the_order_of_the_table(tmp_path: Path):
    weights = random_weights(TINY)
    files = target("hf", weights, shard_bytes=4000).files()
    assert [chunk for file in files for chunk in file.chunks] == separate(TINY)
    assert [file.name for file in files][::6] == [
        "model-00001-of-00007.safetensors",
        "model-00007-of-00007.safetensors",
    ]
    sizes = [sum(4 * torch.Size(chunk.shape).numel() for chunk in file.chunks) for file in files]
    assert all(size <= 4000 for size in sizes)
    (single,) = target("hf", weights, shard_bytes=10**6).files()
    assert single.name == SINGLE


def test_a_small_model_is_one_file_without_an_index(tmp_path: Path):
    weights = random_weights(TINY)
    run(weights, target("hf", weights, 10**6), tmp_path / "out", job=JOB, sources=[])
    assert not (tmp_path / "out" / INDEX).exists()
    loaded = load_file(tmp_path / "out" / SINGLE)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected("hf").items())


def test_transformers_loads_a_copy_of_its_own_model(tmp_path: Path):
    model = llama(tmp_path / "source")
    storage = SafetensorsStorage(tmp_path / "source")
    weights = llama_weights(storage)
    config = (tmp_path / "source" / "config.json").read_bytes()
    chunks = weights.chunks
    copy = HuggingFaceTarget(chunks, stored_dtypes(chunks, weights), 10**5, {"config.json": config})
    run(weights, copy, tmp_path / "out", job=JOB, sources=[storage])
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    state = model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())


def llama_weights(storage: SafetensorsStorage) -> Any:
    """A Llama's tensors under their own names."""
    from nemo_skymoe.checkpoint.hugging_face.names import chunks

    architecture = Architecture(2, 64, 96, 4, vocab_size=storage.tensors["lm_head.weight"].shape[0])
    weights: Any = StoredWeights(storage, architecture, chunks(architecture))
    weights.chunks = chunks(architecture)
    return weights


@pytest.mark.parametrize("dtype", DTYPES)
def test_pytorch_loads_the_torch_dist_checkpoint(dtype: torch.dtype, tmp_path: Path):
    write("torch_dist", random_weights(TINY, dtype), tmp_path / "out")
    tensors = expected("torch_dist", dtype)
    loaded = {name: torch.empty_like(tensor) for name, tensor in tensors.items()}
    load(loaded, storage_reader=FileSystemReader(tmp_path / "out" / "weights"), no_dist=True)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    dcp_to_torch_save(tmp_path / "out" / "weights", tmp_path / "whole.pt")
    whole = torch.load(tmp_path / "whole.pt", weights_only=False)
    assert all(torch.equal(whole[name], tensor) for name, tensor in tensors.items())
    assert whole[EXTRA_STATES[0]] == [None]


def load_sharded(folder: str) -> bool:
    """On two ranks: strictly, each rank half of the matrices, in other pieces than they were written."""
    cpu_runtime.apply()
    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel()
    rank = torch.distributed.get_rank()
    state: dict[str, Any] = {}
    tensors = expected("torch_dist")
    for name, tensor in tensors.items():
        if tensor.dim() > 2:
            axis = tensor.dim() - 2
            half = torch.zeros_like(tensor.chunk(2, axis)[rank])
            state[name] = ShardedTensor.from_rank_offsets(name, half, (axis, rank, 2))
        else:
            state[name] = ShardedTensor.from_rank_offsets(name, torch.zeros_like(tensor), replica_id=rank)
    key = EXTRA_STATES[0].partition("/")[0]
    state["extra"] = ShardedObject(key, "not loaded", (1,), (0,), replica_id=rank)
    loaded: Any = dist_checkpointing.load(state, folder, strict="raise_all")
    return loaded["extra"] is None and all(
        torch.equal(loaded[name], tensor.chunk(2, tensor.dim() - 2)[rank] if tensor.dim() > 2 else tensor)
        for name, tensor in tensors.items()
    )


def test_megatron_loads_the_torch_dist_checkpoint(tmp_path: Path):
    write("torch_dist", random_weights(TINY), tmp_path / "out")
    assert run_ranks(load_sharded, 2, str(tmp_path / "out" / "weights")) == [True, True]


def test_nothing_in_a_torch_dist_checkpoint_depends_on_the_place(tmp_path: Path):
    for name in ("a", "a-longer-name"):
        write("torch_dist", random_weights(TINY), tmp_path / name)
    contents = [
        {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        for folder in (tmp_path / "a", tmp_path / "a-longer-name")
    ]
    assert contents[0] == contents[1]
    assert not any(str(tmp_path).encode() in data for data in contents[0].values())
    names = {name for name in contents[0] if name.endswith(".distcp")}
    assert names == {f"weights/__{number}_0.distcp" for number in range(len(stacked(TINY)) + 1)}


@pytest.mark.parametrize("kind", ["hf", "torch_dist"])
def test_there_and_back(kind: str, tmp_path: Path):
    """Also NaN with a payload, where it is allowed."""
    weights = random_weights(TINY, torch.bfloat16)
    weights.values[Key("down", 0, 1)].view(torch.int16)[0, :3] = torch.tensor([0x7FC1, 0x7F81, -1]).short()
    other = "torch_dist" if kind == "hf" else "hf"
    write(kind, weights, tmp_path / "1")
    first, storage = open_folder(kind, tmp_path / "1")
    write(other, first, tmp_path / "2", [storage], allow_nonfinite=True)
    second, storage = open_folder(other, tmp_path / "2")
    write(kind, second, tmp_path / "3", [storage], allow_nonfinite=True)
    third, _ = open_folder(kind, tmp_path / "3")
    for key in weights.values:
        assert torch.equal(third.read(key).view(torch.int16), weights.read(key).view(torch.int16))


@pytest.mark.parametrize("kind", ["hf", "torch_dist"])
def test_size_is_known_beforehand(kind: str, tmp_path: Path):
    weights = random_weights(Architecture(1, 512, 512, 4, vocab_size=64, num_moe_experts=2))
    chosen = target("hf", weights, 10**7) if kind == "hf" else target(kind, weights)
    run(weights, chosen, tmp_path / "out", job=JOB, sources=[])
    taken = sum(file.stat().st_size for file in (tmp_path / "out").rglob("*") if file.is_file())
    assert chosen.bytes == pytest.approx(taken, rel=0.01)


def test_a_stacked_tensor_has_one_data_type():
    weights = random_weights(TINY)
    weights.values[Key("down", 0, 1)] = weights.values[Key("down", 0, 1)].half()
    with pytest.raises(ConfigurationError, match=r"fc2' would hold down of layer 0, expert 1 in float16"):
        stored_dtypes(stacked(TINY), weights)
    assert stored_dtypes(separate(TINY), weights)["down.0.1"] == "float16"


@pytest.mark.parametrize(
    ("number", "replacement", "message"),
    [
        (3, [], r"key of layer 0 would not be written exactly once"),
        (-1, [0], "'module.embedding' would be written 2 times"),
        (11, [], "'module.layers.experts.fc2' would be written in 1 of 2 pieces"),
    ],
)
def test_an_incomplete_table_is_refused(number: int, replacement: list[int], message: str):
    table = stacked(TINY)
    changed = list(table)
    changed[number : number + 1 if number >= 0 else None] = [table[each] for each in replacement]
    with pytest.raises(ConfigurationError, match=message):
        check_complete(changed, random_weights(TINY))


def test_storage_of_what_was_written_lists_its_files(tmp_path: Path):
    write("torch_dist", random_weights(TINY), tmp_path / "out")
    assert len(TorchDistStorage(tmp_path / "out").files) == len(stacked(TINY)) + 1
