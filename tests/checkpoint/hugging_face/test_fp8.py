"""FP8 as a source, by tensor (the release's form) and by block: numbers times their scale, rounded to bfloat16 once."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nemo_skymoe.checkpoint import convert
from nemo_skymoe.checkpoint.convert import TargetOptions
from nemo_skymoe.checkpoint.hugging_face.fp8 import Dequantized
from nemo_skymoe.checkpoint.hugging_face.opening import open_hugging_face
from nemo_skymoe.checkpoint.sources import open_source
from nemo_skymoe.checkpoint.tensors.model import Key
from nemo_skymoe.checkpoint.verification.verifier import verify
from nemo_skymoe.config import ConfigurationError
from tests.checkpoint import hf_models
from tests.checkpoint.fakes import DictStorage

WEIGHT = "w1.weight"


def quantized(weight: Tensor, dtype: torch.dtype = torch.float8_e4m3fn) -> tuple[Tensor, Tensor]:
    """A tensor in 8 bits and its scale, as AutoFP8 makes them."""
    scale = weight.float().abs().max() / torch.finfo(dtype).max
    return (weight.float() / scale).to(dtype), scale


def fp8_release(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Save a Skywork-MoE in FP8 with every kind of scale; returns the bfloat16 tensors and the stored ones."""
    tensors = hf_models.skywork_moe(folder)
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if "proj" not in name and ".experts." not in name:
            stored[name] = tensor
            continue
        stored[name], stored[f"{name}_scale"] = quantized(tensor)
        stored[name.replace(".weight", ".act_scale")] = torch.tensor(0.5)
    for layer in range(2):
        stored[f"model.layers.{layer}.self_attn.kv_scale"] = torch.tensor(2.0)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "activation_scheme": "static"}
    for file in folder.iterdir():
        file.unlink()
    hf_models.save(folder, stored, config)
    return tensors, stored


def test_release(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    tensors, stored = fp8_release(tmp_path)
    weights, description = open_hugging_face(tmp_path)
    assert description.dtype == "bfloat16"
    keys = weights.keys()
    assert {weights.info(key).dtype for key in keys} == {"bfloat16"}
    moe = "model.layers.1.block_sparse_moe"
    scales = set()
    for kind, name in (("gate", "w1"), ("down", "w2"), ("up", "w3")):
        name = f"{moe}.experts.2.{name}.weight"
        scale = stored[f"{name}_scale"]
        scales.add(scale.item())
        tensor = weights.read(Key(kind, 1, 2))
        assert torch.equal(tensor, (stored[name].float() * scale).to(torch.bfloat16))
        # 3 bits of mantissa: half a unit in the last place is 1/16 of the value, plus what is below the least step.
        assert torch.allclose(tensor.float(), tensors[name].float(), rtol=1 / 15, atol=scale.item() * 2**-9)
    assert len(scales) == 3
    assert torch.equal(weights.read(Key("router", 1)), tensors[f"{moe}.gate.weight"])
    assert "32 tensors '*.act_scale' are not needed" in caplog.text
    assert "2 tensors '*.kv_scale' are not needed" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
def test_every_code_and_any_rows(dtype: torch.dtype, shape: tuple[int, ...]):
    codes = torch.arange(256, dtype=torch.uint8).view(dtype).reshape(16, 16)
    storage = DictStorage({WEIGHT: codes, f"{WEIGHT}_scale": torch.full(shape, 0.37)})
    rows = Dequantized(storage).read(WEIGHT, rows=(3, 9))
    expected = (codes[3:9].float() * torch.tensor(0.37)).to(torch.bfloat16)
    assert torch.equal(rows.view(torch.int16), expected.view(torch.int16))


GOOD = {WEIGHT: torch.ones(2, 2).to(torch.float8_e4m3fn), f"{WEIGHT}_scale": torch.ones(())}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"{WEIGHT}_scale": None}, "'w1.weight_scale' is missing"),
        ({WEIGHT: None}, "'w1.weight_scale' scales no 8-bit tensor"),
        ({WEIGHT: torch.ones(2, 2)}, "'w1.weight_scale' scales no 8-bit tensor"),
        ({f"{WEIGHT}_scale": torch.ones(2)}, r"'w1.weight_scale' is \[2\], expected one number"),
    ],
    ids=["no scale", "no weight", "not 8 bits", "a scale a row"],
)
def test_refused_from_headers(changes: dict[str, Any], message: str):
    tensors = {name: tensor for name, tensor in (GOOD | changes).items() if tensor is not None}
    with pytest.raises(ConfigurationError, match=message):
        Dequantized(DictStorage(tensors))


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_refused_when_read(scale: float):
    storage = Dequantized(DictStorage(GOOD | {f"{WEIGHT}_scale": torch.tensor(scale)}))
    with pytest.raises(
        ConfigurationError, match=r"'w1\.weight_scale' in 'in-memory' is .*, expected a positive"
    ):
        storage.read(WEIGHT)


def test_every_code_in_any_block():
    """Blocks that do not divide the tensor, against a product that is written out."""
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes.view(torch.float8_e4m3fn).reshape(16, 16)[:, :13].contiguous()
    rows, columns = 5, 4
    scales = torch.rand(4, 4) + 0.1
    storage = Dequantized(DictStorage({WEIGHT: codes, f"{WEIGHT}_scale_inv": scales}), (rows, columns))
    expected = torch.stack(
        [
            torch.stack([codes[i, j].float() * scales[i // rows, j // columns] for j in range(13)])
            for i in range(16)
        ]
    ).to(torch.bfloat16)
    reads = (((), None), ((), (3, 9)), ((), (0, 0)), ((7,), None), ((7,), (2, 9)), ((7, 3), None))
    for index, wanted in reads:
        part = expected[index] if wanted is None else expected[index][wanted[0] : wanted[1]]
        found = storage.read(WEIGHT, index, wanted)
        assert found.shape == part.shape
        assert torch.equal(found.view(torch.int16), part.view(torch.int16)), (index, wanted)


def by_block(folder: Path, block: tuple[int, int]) -> None:
    """A dense model whose projections are stored in blocks of 8 bits, as Qwen3 and DeepSeek-V3 are."""
    stored: dict[str, Tensor] = {}
    for name, tensor in hf_models.skywork_dense(folder).items():
        stored[name] = tensor
        if "proj" in name:
            sizes = [-(-size // side) for size, side in zip(tensor.shape, block, strict=True)]
            scales = torch.rand(sizes) + 0.5
            spread = torch.kron(scales, torch.ones(block))[: tensor.shape[0], : tensor.shape[1]]
            stored[name] = (tensor.float() / spread).to(torch.float8_e4m3fn)
            stored[f"{name}_scale_inv"] = scales
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(block)}
    for file in folder.iterdir():
        file.unlink()
    hf_models.save(folder, stored, config)


def test_a_model_in_blocks_is_converted_and_verified(tmp_path: Path):
    by_block(tmp_path / "model", (24, 40))
    for to in ("hf", "nemo"):
        convert.plan({"base": open_source(tmp_path / "model")}, TargetOptions(to)).run(tmp_path / to)
        assert verify({"base": tmp_path / "model"}, tmp_path / to).problems == []


def test_blocks_that_do_not_fit_are_refused():
    scales = f"{WEIGHT}_scale_inv"
    for block, tensors, message in (
        (
            (2, 1),
            GOOD | {f"{WEIGHT}_scale": None, scales: torch.ones(1, 1)},
            r"expected \[1, 2\] for blocks of \[2, 1\]",
        ),
        ((2, 2), GOOD, "'w1.weight_scale_inv' is missing"),
        (None, GOOD | {f"{WEIGHT}_scale": None, scales: torch.ones(1, 1)}, "has the scales of blocks"),
    ):
        named = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        with pytest.raises(ConfigurationError, match=message):
            Dequantized(DictStorage(named), block)
    storage = Dequantized(DictStorage({WEIGHT: GOOD[WEIGHT], scales: torch.tensor([[1.0, -2.0]])}), (2, 1))
    with pytest.raises(ConfigurationError, match=r"is -2\.0, expected a positive number"):
        storage.read(WEIGHT)
