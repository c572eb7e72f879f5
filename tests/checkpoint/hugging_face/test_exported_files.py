"""The files written beside the weights: a configuration that still holds, and a tokenizer copied byte for byte."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, MistralConfig

from nemo_skymoe.architecture import Architecture
from nemo_skymoe.checkpoint.companions import companion_files
from nemo_skymoe.checkpoint.description import Description
from nemo_skymoe.checkpoint.hugging_face.configuration import from_hf_config
from nemo_skymoe.checkpoint.hugging_face.exported_files import AUTO_MAP, extras, to_hf_config
from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.moe.gating import normalize_gating_logits
from tests.checkpoint import hf_models

DENSE = hf_models.SIZES | hf_models.SKYWORK
MOE = DENSE | hf_models.SKYWORK_MOE | {"num_experts_per_tok": 2}


def saved_by_transformers(kind: Any, **values: Any) -> dict[str, Any]:
    name = kind.__name__.replace("Config", "ForCausalLM")
    config = kind(**hf_models.SIZES, **values, architectures=[name], dtype="float32")
    return json.loads(config.to_json_string())


@pytest.mark.parametrize(
    "raw",
    [
        saved_by_transformers(LlamaConfig, num_key_value_heads=2, rope_theta=5e5),
        saved_by_transformers(LlamaConfig, rope_scaling={"rope_type": "linear", "factor": 2.0}),
        saved_by_transformers(MistralConfig, num_key_value_heads=2, head_dim=32, sliding_window=256),
        DENSE | {"use_cache": False, "unheard_of": [1, 2], "torch_dtype": "float16"},
        MOE
        | {"num_local_experts": 4, "moe_gate_norm_std": 2.0, "auto_map": {"AutoTokenizer": ["t.T", None]}},
    ],
    ids=["llama", "linear", "mistral", "skywork", "moe"],
)
def test_every_value_comes_back(raw: dict[str, Any]):
    description = from_hf_config(raw)
    written = to_hf_config(description)
    # transformers 5 writes `rope_parameters`, of which both transformers read what is written in their place.
    kept = raw.keys() - {"auto_map", "rope_parameters"}
    assert {name: written[name] for name in kept} == {name: raw[name] for name in kept}
    ours = AUTO_MAP if description.family == "skywork" else {}
    assert written.get("auto_map", {}) == ours | raw.get("auto_map", {})
    assert from_hf_config(written) == description


def test_what_no_longer_holds_is_replaced():
    raw = DENSE | {
        "rope_scaling": {"type": "ntk", "factor": 4.0},
        "quantization_config": {"quant_method": "fp8"},
        "auto_map": {"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"},
    }
    written = to_hf_config(from_hf_config(raw))
    assert (written["rope_theta"], written["rope_scaling"]) == (4e4, None)
    assert "quantization_config" not in written
    assert written["auto_map"] == AUTO_MAP


@pytest.mark.parametrize("kind", [LlamaConfig, MistralConfig])
def test_upcycled_from_another_family(kind: Any):
    raw = saved_by_transformers(kind, num_key_value_heads=2, rope_theta=5e5)
    if kind is MistralConfig:
        raw["sliding_window"] = 256
    dense = from_hf_config(raw)
    written = to_hf_config(replace(dense, architecture=dense.architecture.with_experts(8)))
    assert written["architectures"] == ["SkyworkForCausalLM"]
    assert (written["model_type"], written["auto_map"]) == ("skywork", AUTO_MAP)
    assert (written["num_experts"], written["num_experts_per_tok"]) == ([8], 2)
    assert (written["moe_use_logits_norm"], written["moe_gate_norm_std"]) == (True, 1.0)
    assert (written["rope_theta"], written["num_key_value_heads"]) == (5e5, 2)
    assert "sliding_window" not in written


def test_population_standard_deviation_is_written_as_the_same_function():
    torch.manual_seed(0)
    logits = torch.randn(5, 16, dtype=torch.float64)
    trained = Description(
        Architecture(2, 64, 96, 4, 419, num_moe_experts=16),
        moe_router_logit_norm_scale=0.7,
        moe_router_logit_norm_correction=0,
    )
    read_back = from_hf_config(to_hf_config(trained))
    scale = read_back.moe_router_logit_norm_scale
    assert scale is not None
    assert read_back.moe_router_logit_norm_correction == 1
    torch.testing.assert_close(
        normalize_gating_logits(logits, scale, correction=1),
        normalize_gating_logits(logits, 0.7, correction=0),
        rtol=1e-14,
        atol=1e-14,
    )


def test_without_normalisation():
    description = from_hf_config(MOE | {"moe_use_logits_norm": False})
    assert to_hf_config(description)["moe_use_logits_norm"] is False
    assert from_hf_config(to_hf_config(description)) == description


TOKENIZER = {
    "tokenizer.model": b"\x00sentencepiece\xff",
    "tokenizer_config.json": b'{"a": 1}\r\n',
    "special_tokens_map.json": b"{}",
    "tokenization_skywork.py": b"class SkyworkTokenizer: ...",
    "generation_config.json": b'{"eos_token_id": 2}',
    "chat_template.jinja": b"{{ messages }}",
    "additional_chat_templates/tool.jinja": b"{{ tools }}",
    "LICENSE": b"(c)",
}


def test_tokenizer_travels_byte_for_byte_and_nothing_else_does(tmp_path: Path):
    hf_models.skywork_dense(tmp_path)
    others = {"modeling_skywork.py": b"theirs", "pytorch_model.bin": b"pickle", "notes.md": b"#"}
    for name, content in (TOKENIZER | others).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    description = from_hf_config(DENSE)
    files = extras(description, tmp_path)
    assert {name: files[name] for name in TOKENIZER} == TOKENIZER
    assert set(files) - set(TOKENIZER) == {"config.json", "configuration_skywork.py", "modeling_skywork.py"}
    assert json.loads(files["config.json"]) == to_hf_config(description)
    assert b"theirs" not in files["modeling_skywork.py"]


def test_same_bytes_every_time():
    shuffled = from_hf_config(dict(reversed(MOE.items())))
    assert extras(from_hf_config(MOE), None) == extras(shuffled, None)


def test_llama_needs_no_modeling_files():
    assert set(extras(from_hf_config(saved_by_transformers(LlamaConfig)), None)) == {"config.json"}


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda file: file.symlink_to(file)])
def test_tokenizer_that_is_no_file(make: Callable[[Path], None], tmp_path: Path):
    make(tmp_path / "tokenizer.model")
    with pytest.raises(
        ConfigurationError,
        match=r"tokenizer\.model' is ('.*expected a regular file|a link to '.*cannot be opened)",
    ):
        extras(from_hf_config(DENSE), tmp_path)


def test_a_snapshot_of_the_cache_is_links_to_blobs(tmp_path: Path):
    snapshot, blob = tmp_path / "snapshots/1a2b", tmp_path / "blobs/c3d4"
    for file in (snapshot / "x", blob):
        file.parent.mkdir(parents=True)
    blob.write_bytes(b"vocabulary")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/c3d4")
    assert companion_files(snapshot) == {"tokenizer.json": b"vocabulary"}


def test_a_link_does_not_fetch_what_lies_elsewhere(tmp_path: Path):
    (tmp_path / "secret").write_text("key")
    (tmp_path / "model").mkdir()
    (tmp_path / "model/tokenizer.json").symlink_to(tmp_path / "secret")
    with pytest.raises(
        ConfigurationError, match=r"tokenizer\.json' is a link to '.*secret', expected a regular file inside"
    ):
        companion_files(tmp_path / "model")


def test_a_link_to_the_same_file_elsewhere_is_followed(tmp_path: Path):
    blobs = tmp_path / "models--org--name" / "blobs"
    for folder in (blobs, tmp_path / "disk", tmp_path / "model"):
        folder.mkdir(parents=True)
    (blobs / "a1b2").write_bytes(b"blob")
    (tmp_path / "disk/vocab.json").write_bytes(b"{}")
    (tmp_path / "model/tokenizer.json").symlink_to(blobs / "a1b2")
    (tmp_path / "model/vocab.json").symlink_to(tmp_path / "disk/vocab.json")
    assert companion_files(tmp_path / "model") == {"tokenizer.json": b"blob", "vocab.json": b"{}"}
