"""Tables of Hugging Face's layouts against what transformers itself saves, and against the published counts."""

import json
import logging
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from nemo_skymoe.architecture import SKYWORK_13B, SKYWORK_MOE_146B, Architecture
from nemo_skymoe.checkpoint.hugging_face import names as hugging_face_names
from nemo_skymoe.checkpoint.hugging_face.opening import open_hugging_face
from nemo_skymoe.checkpoint.tensors.mapping import assemble
from nemo_skymoe.checkpoint.tensors.model import Key, key_shape, model_keys
from nemo_skymoe.config import ConfigurationError
from tests.checkpoint import hf_models

LAYER = {
    "attention_norm": "input_layernorm",
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "attention_output": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
MODEL = {"embedding": "model.embed_tokens", "final_norm": "model.norm", "output": "lm_head"}


@pytest.mark.parametrize(
    ("architecture", "tensors", "parameters"),
    [(SKYWORK_13B, 471, 13_854_113_280), (SKYWORK_MOE_146B, 2863, 146_356_167_168)],
    ids=["13B", "146B"],
)
def test_published_counts(architecture: Architecture, tensors: int, parameters: int):
    chunks = hugging_face_names.chunks(architecture)
    assert len(chunks) == len({chunk.tensor for chunk in chunks}) == tensors
    assert sum(prod(chunk.shape) for chunk in chunks) == parameters


@pytest.mark.parametrize("naming", get_args(hugging_face_names.Naming))
@pytest.mark.parametrize("architecture", [SKYWORK_13B, SKYWORK_MOE_146B], ids=["13B", "146B"])
def test_every_row_of_every_tensor_has_one_place(architecture: Architecture, naming: str):
    places = [part for chunk in hugging_face_names.chunks(architecture, naming) for part in chunk.parts]
    assert sorted((part.key, part.start, part.stop) for part in places) == sorted(
        (key, 0, key_shape(architecture, key)[0]) for key in model_keys(architecture)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("save", "config"),
    [
        (hf_models.llama, {}),
        (hf_models.llama, {"num_key_value_heads": 1}),
        (hf_models.llama, {"tie_word_embeddings": True}),
        (hf_models.mistral, {}),
        (hf_models.mistral, {"head_dim": 32}),
    ],
    ids=["llama", "llama of one group", "llama that is tied", "mistral", "mistral of wide heads"],
)
def test_against_transformers(
    save: Callable[..., Any], config: dict[str, Any], dtype: torch.dtype, tmp_path: Path
):
    saved = save(tmp_path, dtype=dtype, **config).state_dict()
    weights, description = open_hugging_face(tmp_path)
    for key in model_keys(description.architecture):
        name = MODEL[key.kind] if key.layer is None else f"model.layers.{key.layer}.{LAYER[key.kind]}"
        tensor = weights.read(key)
        assert torch.equal(tensor, saved.pop(f"{name}.weight"))
        assert weights.info(key).shape == tensor.shape
        assert f"torch.{weights.info(key).dtype}" == str(tensor.dtype) == str(dtype)
    assert list(saved) == (["lm_head.weight"] if config.get("tie_word_embeddings") else [])
    assert f"torch.{description.dtype}" == str(dtype)


def test_released_moe(tmp_path: Path):
    saved = hf_models.skywork_moe(tmp_path, num_key_value_heads=2)
    weights, description = open_hugging_face(tmp_path)
    assert description.architecture == Architecture(
        2, 64, 96, 4, hf_models.VOCAB_SIZE, num_query_groups=2, num_moe_experts=4
    )
    moe = "model.layers.1.block_sparse_moe"
    assert torch.equal(weights.read(Key("router", 1)), saved[f"{moe}.gate.weight"])
    for kind, name in (("gate", "w1"), ("up", "w3"), ("down", "w2")):
        assert torch.equal(weights.read(Key(kind, 1, 3)), saved[f"{moe}.experts.3.{name}.weight"])


def authors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A released MoE's tensors as the authors' trainer would have named and fused them."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        layer, _, rest = name.partition(".block_sparse_moe.")
        match rest.split("."):
            case ["gate", "weight"]:
                renamed[f"{layer}.mlp.moe.gate.wg.weight"] = tensor
            case ["experts", expert, "w1", "weight"]:
                up = tensors[name.replace("w1", "w3")]
                fused = f"{layer}.mlp.moe.experts.experts.{expert}.up_proj.weight"
                renamed[fused] = torch.cat([tensor, up])
            case ["experts", expert, "w2", "weight"]:
                renamed[f"{layer}.mlp.moe.experts.experts.{expert}.down_proj.weight"] = tensor
            case ["experts", _, "w3", "weight"]:
                pass
            case _:
                renamed[name] = tensor
    return renamed


def test_authors_naming_is_the_same_model(tmp_path: Path):
    tensors = hf_models.skywork_moe(tmp_path / "released")
    config = json.loads((tmp_path / "released/config.json").read_text())
    hf_models.save(tmp_path / "authors", authors(tensors), config)
    released, _ = open_hugging_face(tmp_path / "released")
    fused, description = open_hugging_face(tmp_path / "authors")
    keys = model_keys(description.architecture)
    assert fused.keys() == released.keys() == keys
    assert all(torch.equal(fused.read(key), released.read(key)) for key in keys)


def test_two_layer_gate_of_the_authors_is_refused_even_if_the_configuration_is_silent(tmp_path: Path):
    config = hf_models.SIZES | hf_models.SKYWORK | {"num_experts": [4]}
    tensors = authors(hf_models.moe_tensors(config, seed=0))
    for layer in range(2):
        gate = f"model.layers.{layer}.mlp.moe.gate.wg"
        del tensors[f"{gate}.weight"]
        tensors |= {f"{gate}.0.weight": torch.ones(32, 64), f"{gate}.2.weight": torch.ones(4, 32)}
    hf_models.save(tmp_path, tensors, config)
    with pytest.raises(ConfigurationError, match=r"wg.weight' is missing; .*wg.0.weight' has no place"):
        open_hugging_face(tmp_path)


@pytest.mark.parametrize("naming", get_args(hugging_face_names.Naming))
def test_back_to_the_same_tensors(naming: str, tmp_path: Path):
    tensors = hf_models.skywork_moe(tmp_path)
    if naming == "authors":
        tensors = authors(tensors)
    if naming == "qwen3_moe":
        for theirs, name in ((".w1", ".gate_proj"), (".w2", ".down_proj"), (".w3", ".up_proj")):
            renamed = {key: key.replace(f"{theirs}.weight", f"{name}.weight") for key in tensors}
            tensors = {renamed[key]: tensor for key, tensor in tensors.items()}
        tensors = {key.replace("block_sparse_moe", "mlp"): tensor for key, tensor in tensors.items()}
    weights, description = open_hugging_face(tmp_path)
    written = {
        chunk.tensor: assemble(chunk, weights, torch.bfloat16)
        for chunk in hugging_face_names.chunks(description.architecture, naming)
    }
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in tensors.items())


def test_buffers_of_older_transformers_are_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    tensors = hf_models.skywork_dense(tmp_path)
    frequencies = 10000.0 ** -(torch.arange(0, 16, 2) / 16)
    extra = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": frequencies.clone() for layer in range(2)}
    extra |= {f"model.layers.{layer}.self_attn.k_scale": torch.ones(()) for layer in range(2)}
    hf_models.save(tmp_path, tensors | extra, json.loads((tmp_path / "config.json").read_text()))
    weights, _ = open_hugging_face(tmp_path)
    assert len(weights.storage.tensors) == len(tensors)
    assert "2 tensors '*.k_scale' are not needed" in caplog.text


def test_data_type_is_that_of_the_weights(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    tensors = hf_models.skywork_dense(tmp_path)
    hf_models.save(tmp_path, tensors, hf_models.SIZES | hf_models.SKYWORK | {"torch_dtype": "float16"})
    assert open_hugging_face(tmp_path)[1].dtype == "bfloat16"
    assert "torch_dtype is float16, the weights are bfloat16" in caplog.text


EXPERT = "model.layers.0.block_sparse_moe.experts.3.w1.weight"


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        ({}, {"vocab_size": 512}, r"config.json': vocab_size is 512, the embedding is \[419, 64\]"),
        (
            {},
            {"num_experts": [5]},
            "'model.layers.0.block_sparse_moe.experts.4.w1.weight' is missing",
        ),
        ({}, {"num_experts": [3]}, f"'{EXPERT}' has no place in the model"),
        ({}, {"num_experts": None}, "'model.layers.0.mlp.down_proj.weight' is missing"),
        ({}, {"num_hidden_layers": 3}, "'model.layers.2.* is missing"),
        ({}, {"intermediate_size": 48}, r"w1.weight' is \[96, 64\], expected \[48, 64\]"),
        ({}, {"tie_word_embeddings": True}, "'lm_head.weight' in .* differs from 'model.embed"),
        ({EXPERT: None}, {}, f"'{EXPERT}' is missing"),
        ({EXPERT: torch.ones(96, 65)}, {}, rf"'{EXPERT}' is \[96, 65\], expected \[96, 64\]"),
        ({"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}, {}, "q_proj.bias' has no place"),
        ({EXPERT: torch.ones(96, 64, dtype=torch.int8)}, {}, f"of other types than .*'{EXPERT}' is int8"),
        ({"model.embed_tokens.weight": torch.ones(())}, {}, r"the embedding is \[\]"),
    ],
    ids=[
        "vocab",
        "experts",
        "experts-",
        "dense",
        "layers",
        "ffn",
        "tied",
        "gone",
        "shape",
        "bias",
        "int8",
        "0d",
    ],
)
def test_not_the_model_of_its_configuration(
    tensors: dict[str, Tensor | None], config: dict[str, Any], message: str, tmp_path: Path
):
    values = hf_models.SIZES | hf_models.SKYWORK | hf_models.SKYWORK_MOE
    changed = hf_models.moe_tensors(values, seed=0) | tensors
    kept = {name: tensor for name, tensor in changed.items() if tensor is not None}
    hf_models.save(tmp_path, kept, values | config)
    with pytest.raises(ConfigurationError, match=message):
        open_hugging_face(tmp_path)
