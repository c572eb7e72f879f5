"""Weights that `torch.save` wrote are read as those in safetensors are, and nothing in them is run."""

import json
import shutil
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from nemo_skymoe.checkpoint import convert
from nemo_skymoe.checkpoint.convert import TargetOptions
from nemo_skymoe.checkpoint.hugging_face.storage import PICKLED, open_storage
from nemo_skymoe.checkpoint.sources import open_source
from nemo_skymoe.checkpoint.verification.verifier import verify
from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.durable.receipt import RECEIPT
from tests.checkpoint import hf_models
from tests.checkpoint.fuzz import damaged, must_be_read_or_refused
from tests.checkpoint.hostile import archived, payload
from tests.checkpoint.hugging_face.test_storage import same_bytes, tensors

INDEX = f"{PICKLED}.index.json"


def as_pickles(folder: Path, output: Path) -> Path:
    """The same model with a shard of `torch.save` for each of safetensors, its tensors parameters as often as not."""
    shutil.copytree(folder, output, ignore=shutil.ignore_patterns("*.safetensors*"))
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(sorted(folder.glob("*.safetensors")), start=1):
        held: OrderedDict[str, Tensor] = OrderedDict(load_file(shard))
        for name in list(held)[::2]:
            held[name] = torch.nn.Parameter(held[name], requires_grad=False)
        held._metadata = OrderedDict({"": {"version": 1}})  # type: ignore[attr-defined]
        name = f"pytorch_model-{number:05}-of-00053.bin"
        torch.save(held, output / name)
        weight_map |= dict.fromkeys(held, name)
    (output / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return output


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model in Skywork-13B's layout, of pickles alone, with its authors' code beside them."""
    folder = tmp_path_factory.mktemp("model")
    classes = {"AutoModelForCausalLM": "modeling_skywork.SkyworkForCausalLM"}
    hf_models.skywork_dense(folder / "safetensors", auto_map=classes)
    (folder / "safetensors/modeling_skywork.py").write_text("raise SystemExit('run')\n")
    return as_pickles(folder / "safetensors", folder / "pickles")


def test_every_type_is_read_as_stored(tmp_path: Path):
    stored = tensors()
    torch.save(stored, tmp_path / PICKLED)
    storage = open_storage(tmp_path)
    assert storage.tensors.keys() == stored.keys()
    for name, tensor in stored.items():
        assert same_bytes(storage.read(name), tensor), name
    assert torch.equal(storage.read("float32", (), (1, 3)), stored["float32"][1:3])
    assert torch.equal(storage.read("float32", (4, 3)), stored["float32"][4, 3])


def test_conversions_are_those_of_the_same_model_in_safetensors(model: Path, tmp_path: Path):
    for to in ("hf", "nemo"):
        written = []
        for source in (model, model.parent / "safetensors"):
            output = tmp_path / f"{source.name}-{to}"
            convert.plan({"base": open_source(source)}, TargetOptions(to)).run(output)
            written.append({f.relative_to(output): f.read_bytes() for f in output.rglob("*") if f.is_file()})
            assert verify({"base": source}, output).problems == []
        for each in written:
            each.pop(Path(RECEIPT))  # it names the source
        assert written[0] == written[1]


def test_a_changed_bit_is_found(model: Path, tmp_path: Path):
    copied = Path(shutil.copytree(model, tmp_path / "copy"))
    convert.plan({"base": open_source(copied)}, TargetOptions("hf")).run(tmp_path / "output")
    shard = max(copied.glob("*.bin"), key=lambda file: file.stat().st_size)
    content = bytearray(shard.read_bytes())
    (extent, *_) = open_storage(copied).extents(shard)
    content[extent.start] ^= 1
    shard.write_bytes(content)
    assert len(verify({"base": copied}, tmp_path / "output").problems) == 1


def test_one_tensor_under_two_names_is_tied(tmp_path: Path):
    saved = hf_models.skywork_dense(tmp_path, tie_word_embeddings=True)
    for file in tmp_path.glob("*.safetensors*"):
        file.unlink()
    saved["lm_head.weight"] = saved["model.embed_tokens.weight"]
    torch.save(saved, tmp_path / PICKLED)
    assert len(open_storage(tmp_path).extents(tmp_path / PICKLED)) == len(saved) - 1
    convert.plan({"base": open_source(tmp_path)}, TargetOptions("hf")).run(tmp_path / "output")
    assert verify({"base": tmp_path}, tmp_path / "output").problems == []


def test_safetensors_beside_them_are_preferred(tmp_path: Path):
    hf_models.skywork_dense(tmp_path)
    (tmp_path / PICKLED).write_bytes(b"never looked at")
    assert open_source(tmp_path).weights.storage.tensors


def saved(value: Any) -> Callable[[Path], None]:
    return lambda file: torch.save(value, file)


def legacy(file: Path) -> None:
    torch.save({"a": torch.ones(2)}, file, _use_new_zipfile_serialization=False)


def test_what_is_refused(tmp_path: Path):
    marker = tmp_path / "marker"
    shared = torch.arange(12.0).reshape(3, 4)
    cases: tuple[tuple[Callable[[Path], Any], str], ...] = (
        (legacy, "is not an archive as torch.save writes since torch 1.6: .*save the model as safetensors"),
        (lambda file: file.write_bytes(b""), "is not an archive"),
        (lambda file: file.write_bytes(payload(marker)), "is not an archive"),
        (lambda file: file.write_bytes(archived(payload(marker))), "refers to 'posix.system'"),
        (saved({"a": shared.t()}), "'a' in .* is no readable tensor: .*strides"),
        (saved({"a": 3}), "'a' in .* is no readable tensor"),
        (saved({"state_dict": {"a": shared}}), "'state_dict' in .* is no readable tensor"),
        (saved([shared]), "holds no dictionary of tensors by name"),
        (saved({1: shared}), "holds no dictionary of tensors by name"),
        (saved({"a": shared.to_sparse()}), "refers to 'torch._utils._rebuild_sparse_tensor'"),
    )
    for make, message in cases:
        make(tmp_path / PICKLED)
        with pytest.raises(ConfigurationError, match=message) as refused:
            open_storage(tmp_path)
        assert "\n" not in str(refused.value)
    assert not marker.exists()


def test_shards_and_index_belong_together(model: Path, tmp_path: Path):
    def copy(number: int) -> Path:
        return Path(shutil.copytree(model, tmp_path / str(number)))

    changes: tuple[tuple[Callable[[Path], Any], str], ...] = (
        (lambda folder: (folder / INDEX).unlink(), rf"has 'pytorch_model-.*\.bin' but no '{INDEX}'"),
        (lambda folder: min(folder.glob("*.bin")).unlink(), "cannot be opened"),
        (lambda folder: shutil.copy(min(folder.glob("*.bin")), folder / PICKLED), f"has both '{PICKLED}'"),
        (
            lambda folder: shutil.copy(
                min(folder.glob("*.bin")), folder / "pytorch_model-00099-of-00099.bin"
            ),
            f"is not in '{INDEX}'",
        ),
        (lambda folder: shutil.copy(min(folder.glob("*.bin")), max(folder.glob("*.bin"))), "differ"),
    )
    for number, (change, message) in enumerate(changes):
        folder = copy(number)
        change(folder)
        with pytest.raises(ConfigurationError, match=message):
            open_source(folder)


def test_fuzzed(tmp_path: Path):
    torch.save({"a": torch.randn(6, 5), "b": torch.arange(7, dtype=torch.bfloat16)}, tmp_path / PICKLED)
    original, random = (tmp_path / PICKLED).read_bytes(), Random(13)

    def read() -> None:
        storage = open_storage(tmp_path)
        for name, info in storage.tensors.items():
            tensor = storage.read(name)
            assert tuple(tensor.shape) == info.shape and tensor.nbytes <= len(original)

    for _ in range(400):
        (tmp_path / PICKLED).write_bytes(damaged(original, random))
        must_be_read_or_refused(read)
