"""The context of a converted checkpoint, without NeMo: what it keeps, and that its bytes never change."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nemo_skymoe.architecture import Architecture
from nemo_skymoe.checkpoint.description import Description
from nemo_skymoe.checkpoint.formats import open_torch_dist
from nemo_skymoe.checkpoint.hugging_face import configuration
from nemo_skymoe.checkpoint.hugging_face.exported_files import config_file
from nemo_skymoe.checkpoint.torch_dist import names as torch_dist_names
from nemo_skymoe.checkpoint.torch_dist.context import context_files
from nemo_skymoe.config import ConfigurationError
from tests.checkpoint.fakes import random_weights
from tests.checkpoint.megatron_files import save

DENSE = Architecture(2, 48, 20, 8, vocab_size=97, num_query_groups=4)
CONFIG = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "sliding_window": None,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
    "initializer_range": 0.03,
}
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "beta_fast": 24.0,
    "beta_slow": 1.0,
    "attention_factor": 1.25,
    "truncate": False,
}
TOKENIZER = '{"model": {"vocab": {"a": 0}}, "added_tokens": []}'


def write(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def test_the_source_description_comes_back(tmp_path: Path) -> None:
    description = configuration.from_hf_config(CONFIG)
    weights = random_weights(description.architecture)
    tensors = {
        chunk.tensor: torch.zeros(chunk.shape)
        for chunk in torch_dist_names.chunks(description.architecture, 128)
    }
    save(tmp_path, tensors)
    write(tmp_path, context_files(description, None, config=config_file(description), padded_vocab_size=128))
    read, again = open_torch_dist(tmp_path)
    assert read.keys() == weights.keys()
    assert again == description
    assert again.raw["initializer_range"] == 0.03 and again.raw["architectures"] == ["MistralForCausalLM"]


def test_without_config_json_the_options_say_the_same(tmp_path: Path) -> None:
    """What NeMo writes after a training has no copy of the source's config.json."""
    moe = Description(
        DENSE.with_experts(4),
        rope_theta=5e5,
        rope_scaling={"rope_type": "linear", "factor": 2.0},
        rms_norm_eps=1e-5,
        max_position_embeddings=512,
        dtype="float32",
        moe_router_logit_norm_scale=None,
        moe_router_logit_norm_correction=0,
    )
    dense = replace(
        moe, architecture=DENSE, moe_router_logit_norm_scale=1.0, moe_router_logit_norm_correction=1
    )
    for number, description in enumerate((moe, dense, replace(dense, rope_scaling=YARN))):
        folder = tmp_path / str(number)
        tensors = {
            chunk.tensor: torch.zeros(chunk.shape)
            for chunk in torch_dist_names.chunks(description.architecture, 97)
        }
        save(folder, tensors)
        write(folder, context_files(description, None, config=config_file(description), padded_vocab_size=97))
        (folder / "context" / "config.json").unlink()
        assert open_torch_dist(folder)[1] == description


def test_the_bytes_depend_on_nothing_but_the_arguments(tmp_path: Path) -> None:
    tokenizer = tmp_path / "source"
    write(
        tokenizer,
        {"tokenizer.json": TOKENIZER.encode(), "tokenizer_config.json": b"{}", "weights.bin": b"no"},
    )
    code = f"""
import hashlib, json, sys
from pathlib import Path
from nemo_skymoe.architecture import SKYWORK_13B
from nemo_skymoe.checkpoint.description import Description
from nemo_skymoe.checkpoint.hugging_face.exported_files import config_file
from nemo_skymoe.checkpoint.torch_dist.context import context_files
description = Description(SKYWORK_13B)
files = context_files(description, Path({str(tokenizer)!r}), config=config_file(description), padded_vocab_size=65536)
print(json.dumps([{{name: hashlib.sha256(content).hexdigest() for name, content in files.items()}},
    sorted({{"torch", "nemo", "fiddle", "numpy"}} & sys.modules.keys())]))
"""
    runs = [
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            cwd=place,
            env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parents[3])},
        ).stdout
        for place, seed in ((tmp_path, "1"), (tokenizer, "2"))
    ]
    assert runs[0] == runs[1]
    files, heavy = json.loads(runs[0])
    assert heavy == []
    assert sorted(files) == [
        "context/config.json",
        "context/io.json",
        "context/model.yaml",
        "context/tokenizer/tokenizer.json",
        "context/tokenizer/tokenizer_config.json",
    ]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"tokenizer.json": TOKENIZER}, ("AutoTokenizer", "tokenizer")),
        ({"tokenizer.model": "", "tokenizer_config.json": "{}"}, ("AutoTokenizer", "tokenizer")),
        (
            {
                "tokenizer.model": "",
                "tokenizer_config.json": '{"auto_map": {}}',
                "tokenization_skywork.py": "1",
            },
            ("SentencePieceTokenizer", "tokenizer/tokenizer.model"),
        ),
        ({"generation_config.json": "{}"}, None),
    ],
    ids=["fast", "sentencepiece", "with code of its own", "none"],
)
def test_the_tokenizer_class_of_nemo(tmp_path: Path, files: dict[str, str], expected: tuple | None) -> None:
    """A tokenizer that brings code along is loaded by SentencePiece, without running the code."""
    write(tmp_path, {name: content.encode() for name, content in files.items()})
    written = context_files(
        Description(DENSE), tmp_path, config=config_file(Description(DENSE)), padded_vocab_size=128
    )
    assert {name for name in written if "tokenizer/" in name} == {
        f"context/tokenizer/{name}" for name in files
    }
    objects = json.loads(written["context/io.json"])["objects"]
    found = [
        (key.removesuffix("_1"), value["items"][0][1]["value"])
        for key, value in objects.items()
        if "Tokenizer" in key
    ]
    assert found == ([] if expected is None else [expected])


def test_a_scaling_that_megatron_lacks_is_refused() -> None:
    description = Description(DENSE, rope_scaling={"rope_type": "longrope", "factor": 2.0})
    with pytest.raises(ConfigurationError, match="rope_scaling is of type 'longrope', which Megatron lacks"):
        context_files(description, None, config=config_file(description), padded_vocab_size=128)
