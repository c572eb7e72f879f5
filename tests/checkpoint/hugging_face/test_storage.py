"""Safetensors folders against the safetensors library, and everything that is refused."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nemo_skymoe.checkpoint.hugging_face.storage import INDEX, SINGLE, SafetensorsStorage
from nemo_skymoe.checkpoint.tensors.regions import tensor_bytes
from nemo_skymoe.config import ConfigurationError
from tests.checkpoint.fuzz import damaged, must_be_read_or_refused

FLOATS = (
    *(torch.bfloat16, torch.float16, torch.float32, torch.float64),
    *(torch.float8_e4m3fn, torch.float8_e5m2),
)
OTHERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64)


def tensors() -> dict[str, Tensor]:
    """One of every data type, a number without dimensions, and one without elements."""
    values = torch.arange(60).reshape(5, 4, 3)
    named = {str(dtype).removeprefix("torch."): values.to(dtype) for dtype in FLOATS + OTHERS}
    return named | {"number": torch.tensor(3.5), "nothing": torch.empty(0, 4)}


def save_shards(folder: Path) -> dict[str, Tensor]:
    """Two shards and their index."""
    stored = tensors()
    names = sorted(stored)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        shard = f"model-{number:05}-of-00002.safetensors"
        save_file({name: stored[name] for name in part}, folder / shard)
        weight_map |= {name: shard for name in part}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return stored


def same_bytes(left: Tensor, right: Tensor) -> bool:
    """Equal also where values are NaN or have no comparison."""
    same_kind = left.dtype == right.dtype and left.shape == right.shape
    return same_kind and bytes(tensor_bytes(left)) == bytes(tensor_bytes(right.contiguous()))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_shards(tmp_path)
    return tmp_path


def test_every_tensor_of_every_type_is_read_as_stored(tmp_path: Path):
    stored = save_shards(tmp_path)
    storage = SafetensorsStorage(tmp_path)
    assert storage.tensors.keys() == stored.keys()
    for name, tensor in stored.items():
        assert storage.tensors[name].shape == tuple(tensor.shape)
        assert same_bytes(storage.read(name), tensor)


def test_regions(folder: Path):
    storage, tensor = SafetensorsStorage(folder), tensors()["float32"]
    assert torch.equal(storage.read("float32", (), (1, 3)), tensor[1:3])
    assert torch.equal(storage.read("float32", (2,)), tensor[2])
    assert torch.equal(storage.read("float32", (4,), (0, 2)), tensor[4, :2])
    assert torch.equal(storage.read("float32", (4, 3)), tensor[4, 3])
    assert storage.read("float32", (), (2, 2)).shape == (0, 4, 3)
    with pytest.raises(IndexError):
        storage.read("float32", (5,))


def test_one_file(tmp_path: Path):
    save_file(tensors(), tmp_path / SINGLE)
    storage = SafetensorsStorage(tmp_path)
    assert storage.files == (tmp_path / SINGLE,)
    assert same_bytes(storage.read("bfloat16"), load_file(tmp_path / SINGLE)["bfloat16"])


def test_extents_are_where_the_bytes_are(folder: Path):
    storage, stored = SafetensorsStorage(folder), tensors()
    found = {}
    for file in storage.files[:-1]:
        data = file.read_bytes()
        found |= {extent.name: data[extent.start : extent.stop] for extent in storage.extents(file)}
    assert found == {name: bytes(tensor_bytes(tensor)) for name, tensor in stored.items()}


def rewrite_header(file: Path, change: Callable[[dict], object]) -> None:
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


def entry(**fields: object) -> Callable[[dict], object]:
    return lambda header: header["bfloat16"].update(fields)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (entry(dtype="F4"), "data type 'F4'"),
        (entry(dtype=["F32"]), "data type"),
        (entry(dtype="F32"), "120 bytes, expected 240"),
        (entry(shape=[5, 4, 4]), "120 bytes, expected 160"),
        (entry(shape=[5, -4, 3]), "shape"),
        (entry(shape=[True, 60]), "shape"),
        (entry(shape=[2**63, 2**63]), "shape"),
        (entry(shape=None), "shape"),
        (entry(data_offsets=[0, 10**15]), "overlaps|bytes, expected"),
        (entry(data_offsets=[-8, 112]), "offsets"),
        (entry(data_offsets=[0, 1, 2]), "offsets"),
        (lambda header: header.pop("bfloat16"), "hole|expected .* by its header"),
        (lambda header: header.update(bfloat16=3), "shape"),
        (lambda header: header.update(twin=header["bfloat16"]), "overlaps|bytes, expected"),
    ],
)
def test_refuses_a_header_that_lies(change: Callable[[dict], object], message: str, tmp_path: Path):
    save_file(tensors(), tmp_path / SINGLE)
    rewrite_header(tmp_path / SINGLE, change)
    with pytest.raises(ConfigurationError, match=message):
        SafetensorsStorage(tmp_path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "truncated: 0 bytes"),
        (b"\x10\0\0", "truncated: 3 bytes"),
        (b"\xff" * 8 + b"{}", "claims a header of"),
        ((10**12).to_bytes(8, "little") + b"{}" * 50, "claims a header of"),
        (b"\0" * 8, "claims a header of 0"),
        (b"\x02" + b"\0" * 7 + b"[]", "expected an object"),
        (b"\x02" + b"\0" * 7 + b"{\xff", "no valid JSON"),
        ((10**5).to_bytes(8, "little") + b"[" * 10**5, "no valid JSON"),
        (b"\x0d" + b"\0" * 7 + b'{"a":1,"a":2}', "occurs twice"),
    ],
)
def test_refuses_a_file_that_has_no_header(data: bytes, message: str, tmp_path: Path):
    (tmp_path / SINGLE).write_bytes(data)
    with pytest.raises(ConfigurationError, match=message):
        SafetensorsStorage(tmp_path)


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_refuses_a_truncated_shard(kept: int, folder: Path):
    shard = folder / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:kept])
    with pytest.raises(ConfigurationError, match="model-00002-of-00002"):
        SafetensorsStorage(folder)


def test_refuses_a_shard_truncated_after_it_was_opened(folder: Path):
    storage = SafetensorsStorage(folder)
    os.truncate(storage.files[0], 8)
    with pytest.raises(ConfigurationError, match="truncated"):
        [storage.read(name) for name in storage.tensors]


@pytest.mark.parametrize(
    "shard",
    [
        "../outside.safetensors",
        "/etc/hostname",
        "..",
        ".",
        "",
        "sub/model.safetensors",
        "dangling",
        "pipe",
        "a\0b",
    ],
)
def test_refuses_a_shard_that_is_not_in_the_folder(shard: str, tmp_path: Path):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(tensors(), tmp_path / "outside.safetensors")
    (folder / "dangling").symlink_to(tmp_path / "unmounted.safetensors")
    os.mkfifo(folder / "pipe")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"bfloat16": shard}}))
    with pytest.raises(ConfigurationError, match=r"same folder|regular file|cannot be opened"):
        SafetensorsStorage(folder)


def test_follows_the_links_that_a_user_has_in_the_folder(tmp_path: Path):
    """The hub's cache, a download whose large files stay in the cache, shards on another disk, links to those."""
    blobs = tmp_path / "models--org--name" / "blobs"
    snapshot = blobs.parent / "snapshots" / "0123"
    disk, local, chain = tmp_path / "disk", tmp_path / "local", tmp_path / "chain"
    for folder in (blobs, snapshot, disk, local, chain):
        folder.mkdir(parents=True)
    save_file(tensors(), blobs / "abc")
    save_file(tensors(), disk / "shard-one.safetensors")
    (snapshot / SINGLE).symlink_to("../../blobs/abc")
    (local / SINGLE).symlink_to(snapshot / SINGLE)
    (chain / "model-00001-of-00001.safetensors").symlink_to(disk / "shard-one.safetensors")
    weight_map = dict.fromkeys(tensors(), "model-00001-of-00001.safetensors")
    (disk / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    (chain / INDEX).symlink_to(disk / INDEX)
    (tmp_path / "linked").symlink_to(chain)
    for folder in (snapshot, local, chain, tmp_path / "linked"):
        assert same_bytes(SafetensorsStorage(folder).read("int8"), tensors()["int8"]), folder


def change_index(folder: Path, change: Callable[[dict], object]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda names: names.pop("bfloat16"), "'bfloat16' is not in the index"),
        (lambda names: names.update(ghost=names["bfloat16"]), "'ghost' is in the index only"),
        (
            lambda names: names.update(bfloat16=names["bool"]),
            "differ: 'bfloat16' is (not in the index|in the index only)",
        ),
        (lambda names: names.update(bfloat16="model-00003-of-00002.safetensors"), "cannot be opened"),
        (lambda names: names.clear(), "no weight_map"),
    ],
)
def test_refuses_an_index_that_differs_from_the_shards(
    change: Callable[[dict], object], message: str, folder: Path
):
    change_index(folder, change)
    with pytest.raises(ConfigurationError, match=message):
        SafetensorsStorage(folder)


def test_refuses_a_tensor_in_two_shards(folder: Path):
    twice = folder / "model-00002-of-00002.safetensors"
    other = load_file(folder / "model-00001-of-00002.safetensors")
    name = min(other)
    save_file({**load_file(twice), name: other[name]}, twice)
    with pytest.raises(ConfigurationError, match=f"'{name}' is not in the index|holds '{name}', as another"):
        SafetensorsStorage(folder)


def test_refuses_stale_shards_and_ambiguity(folder: Path):
    save_file(tensors(), folder / "model-00007-of-00009.safetensors")
    with pytest.raises(ConfigurationError, match="model-00007-of-00009"):
        SafetensorsStorage(folder)
    (folder / "model-00007-of-00009.safetensors").rename(folder / SINGLE)
    with pytest.raises(ConfigurationError, match="has both"):
        SafetensorsStorage(folder)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pytorch_model.bin", "has its weights in pickles.*skymoe convert"),
        ("pytorch_model.pt", "is a pickle, which runs code.*safe_serialization=True"),
        ("consolidated.00.pth", "is a pickle"),
        ("model-00001-of-00002.safetensors", "but no .model.safetensors.index.json."),
        ("readme.md", "neither"),
    ],
)
def test_refuses_a_folder_without_a_safetensors_model(name: str, message: str, tmp_path: Path):
    (tmp_path / name).write_bytes(b"\0" * 100)
    with pytest.raises(ConfigurationError, match=message):
        SafetensorsStorage(tmp_path)


def test_refuses_what_is_no_folder(tmp_path: Path):
    with pytest.raises(ConfigurationError, match="is not a folder"):
        SafetensorsStorage(tmp_path / "nowhere")


def test_fuzzed(tmp_path: Path):
    stored = {"a": torch.randn(6, 5), "b": torch.arange(7, dtype=torch.bfloat16)}
    save_file(stored, tmp_path / SINGLE)
    original, random = (tmp_path / SINGLE).read_bytes(), Random(11)

    def read() -> None:
        storage = SafetensorsStorage(tmp_path)
        for name, info in storage.tensors.items():
            tensor = storage.read(name)
            assert tuple(tensor.shape) == info.shape and tensor.nbytes <= len(original)

    for _ in range(400):
        (tmp_path / SINGLE).write_bytes(damaged(original, random))
        must_be_read_or_refused(read)


def test_fuzzed_index(folder: Path):
    original, random = (folder / INDEX).read_bytes(), Random(12)
    for _ in range(200):
        (folder / INDEX).write_bytes(damaged(original, random))
        must_be_read_or_refused(lambda: SafetensorsStorage(folder))
