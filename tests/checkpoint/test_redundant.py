"""Tensors that repeat others or the configuration: accepted where they agree, refused by name where they do not."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from megatron_files import save
from safetensors.torch import save_file
from torch import Tensor

from nemo_skymoe.architecture import Architecture
from nemo_skymoe.checkpoint import hugging_face, megatron
from nemo_skymoe.checkpoint.description import Description
from nemo_skymoe.checkpoint.hf_files import to_hf_config
from nemo_skymoe.checkpoint.nemo_context import context_files
from nemo_skymoe.config import ConfigurationError

TIED = Architecture(1, 16, 8, 2, vocab_size=40, tied_embeddings=True)
DESCRIPTION = Description(TIED, dtype="float32", rope_theta=500.0)
FREQUENCIES = torch.tensor([1.0, 500.0**-0.25, 500.0**-0.5, 500.0**-0.75])
MASK = torch.ones(1, 1, 5, 5).tril()
EXTRAS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "lm_head.weight": (torch.clone, lambda embedding: embedding + torch.eye(40, 16) * 1e-6),
    "model.layers.0.self_attn.rotary_emb.inv_freq": (
        lambda _: FREQUENCIES.bfloat16(),
        lambda _: FREQUENCIES * torch.tensor([1.0, 1.0, 1.0, 0.9]),
    ),
    "model.rotary_emb.inv_freq": (lambda _: FREQUENCIES, lambda _: FREQUENCIES[:3]),
    "model.layers.0.self_attn.bias": (lambda _: MASK, lambda _: torch.zeros(16)),
    "model.layers.0.self_attn.masked_bias": (lambda _: torch.tensor(-1e4), lambda _: torch.zeros(2)),
}


def test_hugging_face(tmp_path: Path):
    tensors = {chunk.tensor: torch.randn(chunk.shape) for chunk in hugging_face.chunks(TIED)}
    (tmp_path / "config.json").write_text(json.dumps(to_hf_config(DESCRIPTION)))
    embedding = tensors["model.embed_tokens.weight"]
    for name, (right, wrong) in EXTRAS.items():
        save_file(tensors | {name: right(embedding)}, tmp_path / "model.safetensors")
        assert name not in hugging_face.open(tmp_path)[0].storage.tensors
        save_file(tensors | {name: wrong(embedding)}, tmp_path / "model.safetensors")
        with pytest.raises(ConfigurationError, match=f"'{name}' in "):
            hugging_face.open(tmp_path)
    save_file(tensors | {"lm_head.weight": embedding.half()}, tmp_path / "model.safetensors")
    with pytest.raises(
        ConfigurationError, match=r"'lm_head\.weight' in .* differs from 'model\.embed_tokens"
    ):
        hugging_face.open(tmp_path)


def test_megatron(tmp_path: Path):
    tensors = {chunk.tensor: torch.randn(chunk.shape) for chunk in megatron.chunks(TIED, 128)}
    embedding = tensors["module.embedding.word_embeddings.weight"]
    for number, change in enumerate((0.0, 1.0)):
        folder = tmp_path / str(number)
        save(folder, tensors | {"module.output_layer.weight": embedding + change})
        for name, content in context_files(DESCRIPTION, None, padded_vocab_size=128).items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        if not change:
            assert megatron.open(folder)[1] == DESCRIPTION
            continue
        with pytest.raises(ConfigurationError, match=r"'module\.output_layer\.weight' in .* differs from"):
            megatron.open(folder)
