"""Two kinds of proof that a conversion loses nothing: every bit comes back, and both sides compute the same."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from nemo_skymoe.checkpoint import convert
from nemo_skymoe.checkpoint.convert import TargetOptions
from nemo_skymoe.checkpoint.sources import open_source
from nemo_skymoe.checkpoint.upcycling.options import BASE, Upcycling
from nemo_skymoe.checkpoint.verification.megatron_logits import megatron_logits
from nemo_skymoe.checkpoint.verification.same_function import compare_logits
from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.ranks import run_ranks
from tests.checkpoint import hf_models
from tests.checkpoint.hugging_face.test_fp8 import fp8_release
from tests.checkpoint.megatron_files import NANS, bits

TEXT = torch.tensor(list(Path(__file__).read_bytes()[:256])).view(2, 128)
"""Real text as byte values, which any vocabulary here has ids for: [sequences, tokens]."""


def converted(
    source: Path, output: Path, to: str, upcycling: Upcycling | None = None, **options: Any
) -> Path:
    plan = convert.plan({BASE: open_source(source)}, TargetOptions(to, **options), upcycling)
    plan.run(output, allow_nonfinite=True)
    return output


def by_megatron(folder: Path) -> Tensor:
    """In a process of its own: Megatron's process groups are not for this one."""
    [logits] = run_ranks(lambda: megatron_logits(folder, TEXT), 1)
    return logits


@torch.no_grad()
def by_transformers(model: torch.nn.Module) -> Tensor:
    return model.float().eval()(TEXT).logits


def difference(one: Tensor, other: Tensor) -> float:
    """max |difference| / max |logit|."""
    assert one.shape == other.shape and one.dtype == other.dtype == torch.float32
    result = ((one - other).abs().max() / other.abs().max()).item()
    print(f"max|difference| / max|logit| = {result:.1e}")
    return result


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"num_key_value_heads": 2, "tie_word_embeddings": True, "head_dim": 24},
        {"rope_theta": 5e5, "rms_norm_eps": 1e-3, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    ],
    ids=["multi-head", "grouped queries, tied head, wide heads", "rotary base, linear scaling, epsilon"],
)
def test_a_converted_llama_is_transformers_llama(tmp_path: Path, config: dict[str, Any]) -> None:
    model = hf_models.llama(tmp_path / "hf", **config)
    nemo = converted(tmp_path / "hf", tmp_path / "nemo", "nemo")
    assert difference(by_megatron(nemo), by_transformers(model)) <= 1e-5


@pytest.mark.parametrize("gate", [{}, {"moe_gate_norm_std": 0.5}, {"moe_use_logits_norm": False}], ids=str)
def test_an_exported_moe_in_transformers_is_megatrons(
    tmp_path: Path, remote_code: None, gate: dict[str, Any]
) -> None:
    from transformers import AutoModelForCausalLM

    hf_models.skywork_moe(tmp_path / "hf", dtype=torch.float32, **gate)
    nemo = converted(tmp_path / "hf", tmp_path / "nemo", "nemo")
    exported = converted(nemo, tmp_path / "exported", "hf")
    model = AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True, torch_dtype=torch.float32)
    assert difference(by_transformers(model), by_megatron(nemo)) <= 1e-5


@pytest.mark.parametrize(("layers", "tolerance"), [(4, 1e-6), pytest.param(24, 1e-5, marks=pytest.mark.long)])
def test_an_upcycled_moe_is_its_dense_model(tmp_path: Path, layers: int, tolerance: float) -> None:
    hf_models.llama(tmp_path / "hf", num_hidden_layers=layers)
    dense = converted(tmp_path / "hf", tmp_path / "dense", "nemo")
    moe = converted(dense, tmp_path / "moe", "nemo", Upcycling(num_experts=4))
    assert difference(by_megatron(moe), by_megatron(dense)) <= tolerance


@pytest.mark.parametrize(("dtype", "layer_spec"), [(torch.bfloat16, "local"), (torch.float16, "te")], ids=str)
def test_other_dtypes_and_both_layer_specs_load_by_megatron(
    tmp_path: Path, dtype: torch.dtype, layer_spec: str
) -> None:
    """In float32, to which 16 bits widen without loss: the logits are those of the widened weights."""
    tensors = hf_models.skywork_moe(tmp_path / "narrow", dtype=dtype)
    config = json.loads((tmp_path / "narrow" / "config.json").read_text()) | {"torch_dtype": "float32"}
    hf_models.save(tmp_path / "wide", {name: tensor.float() for name, tensor in tensors.items()}, config)
    narrow, wide = (
        by_megatron(converted(tmp_path / name, tmp_path / f"{name}-nemo", "nemo", layer_spec=layer_spec))
        for name in ("narrow", "wide")
    )
    assert torch.equal(narrow, wide)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", ["dense", "moe", "tied"])
def test_there_and_back_every_bit_is_the_same(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    """Hugging Face to NeMo to Hugging Face, NaNs of two payloads among the weights."""
    tied = {"tie_word_embeddings": kind == "tied"}
    if kind == "moe":
        tensors = hf_models.skywork_moe(tmp_path / "hf", dtype=dtype)
    else:
        tensors = hf_models.skywork_dense(tmp_path / "hf", dtype=dtype, num_key_value_heads=2, **tied)
    for name in ("model.embed_tokens.weight", "model.layers.1.self_attn.k_proj.weight"):
        bits(tensors[name])[3, :2] = NANS[dtype]
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    for file in (tmp_path / "hf").iterdir():
        file.unlink()
    hf_models.save(tmp_path / "hf", tensors, config)
    nemo = converted(tmp_path / "hf", tmp_path / "nemo", "nemo")
    back = converted(nemo, tmp_path / "back", "hf", shard_bytes=100_000)
    read = {name: tensor for file in back.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert read.keys() == tensors.keys()
    assert [name for name, tensor in tensors.items() if not torch.equal(bits(read[name]), bits(tensor))] == []
    assert all(read[name].dtype == dtype for name in tensors)
    written = json.loads((back / "config.json").read_text())
    assert {name: written[name] for name in config if name != "auto_map"} == config


def test_the_folder_of_a_run_has_the_logits_of_its_last_checkpoint(tmp_path: Path, remote_code: None) -> None:
    hf_models.skywork_moe(tmp_path / "hf", dtype=torch.float32)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    converted(tmp_path / "hf", tmp_path / "run" / "checkpoints" / "step=9-last", "nemo")
    exported = converted(tmp_path / "run", tmp_path / "exported", "hf")
    found = compare_logits(tmp_path / "run", exported, Path(__file__))
    assert found.preserved and found.problem is None


def test_transformers_is_not_given_what_it_would_compute_wrongly(tmp_path: Path) -> None:
    """8 bits, whose scales it would leave out; with the configuration of the quantisation, and without."""
    fp8_release(tmp_path / "fp8")
    converted(tmp_path / "fp8", tmp_path / "out", "hf")
    config = json.loads((tmp_path / "fp8" / "config.json").read_text())
    for settings in (config, {name: value for name, value in config.items() if "quant" not in name}):
        (tmp_path / "fp8" / "config.json").write_text(json.dumps(settings))
        with pytest.raises(ConfigurationError, match=r"'.*fp8' holds weights of 8 bits, which .* --to hf"):
            compare_logits(tmp_path / "fp8", tmp_path / "out", Path(__file__))
