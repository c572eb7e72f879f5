"""Tensors that repeat others or the configuration: accepted where they agree, refused by name where they do not."""

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from nemo_skymoe.architecture import Architecture
from nemo_skymoe.checkpoint import convert
from nemo_skymoe.checkpoint.convert import TargetOptions
from nemo_skymoe.checkpoint.description import Description
from nemo_skymoe.checkpoint.formats import open_torch_dist
from nemo_skymoe.checkpoint.hugging_face import names as hugging_face_names
from nemo_skymoe.checkpoint.hugging_face.exported_files import config_file, to_hf_config
from nemo_skymoe.checkpoint.hugging_face.opening import open_hugging_face
from nemo_skymoe.checkpoint.sources import open_source
from nemo_skymoe.checkpoint.tensors.model import Key
from nemo_skymoe.checkpoint.torch_dist import names as torch_dist_names
from nemo_skymoe.checkpoint.torch_dist.context import context_files
from nemo_skymoe.checkpoint.upcycling.options import Upcycling
from nemo_skymoe.checkpoint.verification.hugging_face_tensors import HuggingFaceModel
from nemo_skymoe.checkpoint.verification.megatron_logits import megatron_logits
from nemo_skymoe.checkpoint.verification.megatron_tensors import MegatronModel
from nemo_skymoe.checkpoint.verification.same_function import compare_logits, logits_of
from nemo_skymoe.checkpoint.verification.verifier import verify
from nemo_skymoe.config import ConfigurationError
from tests.checkpoint.megatron_files import save

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


def test_frequencies_of_a_scaling_stay_between_plain_and_divided_ones(tmp_path: Path):
    """YaRN's and Llama 3.1's leave high frequencies as they are, and divide low ones."""
    tensors = {chunk.tensor: torch.randn(chunk.shape) for chunk in hugging_face_names.chunks(TIED)}
    name = "model.rotary_emb.inv_freq"
    llama3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    scaled = FREQUENCIES / torch.tensor([1.0, 1.0, 2.5, 4.0])
    for scaling in ({"rope_type": "yarn", "factor": 4.0}, {"rope_type": "llama3", "factor": 4.0, **llama3}):
        config = to_hf_config(replace(DESCRIPTION, rope_scaling=scaling))
        (tmp_path / "config.json").write_text(json.dumps(config))
        for right in (FREQUENCIES, scaled, scaled.bfloat16()):
            save_file(tensors | {name: right}, tmp_path / "model.safetensors")
            assert name not in open_hugging_face(tmp_path)[0].storage.tensors
        for wrong in (scaled / 1.1, FREQUENCIES * torch.tensor([1.0, 1.0, 1.0, 1.1]), scaled[:3]):
            save_file(tensors | {name: wrong}, tmp_path / "model.safetensors")
            with pytest.raises(ConfigurationError, match=f"'{name}' in .* is not what rope_theta 500 and"):
                open_hugging_face(tmp_path)


def test_hugging_face(tmp_path: Path):
    tensors = {chunk.tensor: torch.randn(chunk.shape) for chunk in hugging_face_names.chunks(TIED)}
    (tmp_path / "config.json").write_text(json.dumps(to_hf_config(DESCRIPTION)))
    embedding = tensors["model.embed_tokens.weight"]
    for name, (right, wrong) in EXTRAS.items():
        save_file(tensors | {name: right(embedding)}, tmp_path / "model.safetensors")
        assert name not in open_hugging_face(tmp_path)[0].storage.tensors
        save_file(tensors | {name: wrong(embedding)}, tmp_path / "model.safetensors")
        with pytest.raises(ConfigurationError, match=f"'{name}' in "):
            open_hugging_face(tmp_path)
    save_file(tensors | {"lm_head.weight": embedding.half()}, tmp_path / "model.safetensors")
    with pytest.raises(
        ConfigurationError, match=r"'lm_head\.weight' in .* differs from 'model\.embed_tokens"
    ):
        open_hugging_face(tmp_path)


def test_megatron(tmp_path: Path):
    tensors = {chunk.tensor: torch.randn(chunk.shape) for chunk in torch_dist_names.chunks(TIED, 128)}
    embedding = tensors["module.embedding.word_embeddings.weight"]
    for number, change in enumerate((0.0, 1.0)):
        folder = tmp_path / str(number)
        save(folder, tensors | {"module.output_layer.weight": embedding + change})
        for name, content in context_files(
            DESCRIPTION, None, config=config_file(DESCRIPTION), padded_vocab_size=128
        ).items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        if not change:
            assert open_torch_dist(folder)[1] == DESCRIPTION
            continue
        with pytest.raises(ConfigurationError, match=r"'module\.output_layer\.weight' in .* differs from"):
            open_torch_dist(folder)


STORED = {"embedding": (0,), "head": (1,), "both": (0, 1)}


def opened(form: str, folder: Path, stored: str, *, tied: bool, change: float) -> Any:
    """A model of which embedding, head or both are stored; where both are, they differ by `change`."""
    sizes = replace(TIED, tied_embeddings=False)
    tables = {"hf": hugging_face_names.chunks(sizes), "nemo": torch_dist_names.chunks(sizes, 128)}
    names = {
        "hf": ("model.embed_tokens.weight", "lm_head.weight"),
        "nemo": ("module.embedding.word_embeddings.weight", "module.output_layer.weight"),
    }[form]
    tensors = {
        chunk.tensor: torch.full(chunk.shape, float(number)) for number, chunk in enumerate(tables[form])
    }
    both = torch.arange(tensors[names[0]].numel(), dtype=torch.float32).reshape(tensors[names[0]].shape)
    for number, name in enumerate(names):
        tensors[name] = both + number * change
        if number not in STORED[stored]:
            del tensors[name]
    description = replace(DESCRIPTION, architecture=replace(TIED, tied_embeddings=tied))
    if form == "hf":
        folder.mkdir()
        save_file(tensors, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(to_hf_config(description)))
    else:
        save(folder, tensors)
        for name, content in context_files(
            description, None, config=config_file(description), padded_vocab_size=128
        ).items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
    return open_source(folder)


@pytest.mark.parametrize("form", ["hf", "nemo"])
def test_embedding_and_head_as_one_or_as_two(form: str, tmp_path: Path):
    """Every combination of what is stored, whether it is equal, and what the configuration says of it."""
    expected = torch.arange(40 * 16, dtype=torch.float32).reshape(40, 16)
    for number, (stored, tied, change) in enumerate(product(STORED, (True, False), (0.0, 1.0))):
        folder = tmp_path / str(number)
        if tied and (stored != "both" or not change):
            weights = opened(form, folder, stored, tied=tied, change=0.0).weights
            assert Key("output") not in {*weights.keys()}
            assert torch.equal(weights.read(Key("embedding")), expected)
        elif not tied and stored == "both":
            weights = opened(form, folder, stored, tied=tied, change=change).weights
            assert torch.equal(weights.read(Key("embedding")), expected)
            assert torch.equal(weights.read(Key("output")), expected + change)
        else:
            message = (
                "differs from .* but the configuration says that they are tied"
                if tied
                else "has '.*' but no '.*'"
            )
            with pytest.raises(ConfigurationError, match=message):
                opened(form, folder, stored, tied=tied, change=change)


def test_a_head_that_stands_for_both_is_written_as_the_embedding(tmp_path: Path):
    for form in ("hf", "nemo"):
        source = opened(form, tmp_path / form, "head", tied=True, change=0.0)
        for to in ("hf", "nemo"):
            plan = convert.plan(
                {"base": source}, TargetOptions(to, layer_spec="local" if to == "nemo" else None)
            )
            plan.run(tmp_path / form / to)
            names = open_source(tmp_path / form / to).weights.storage.tensors.keys()
            assert [name for name in names if "embed" in name] and not [
                name for name in names if "head" in name
            ]
            written = open_source(tmp_path / form / to).weights
            for key in (*written.keys(),):
                assert torch.equal(written.read(key), source.weights.read(key)), key
        assert convert.plan({"base": source}, TargetOptions("hf"), Upcycling(2)).run(tmp_path / form / "moe")


def test_megatron_computes_with_a_head_that_stands_for_both(tmp_path: Path):
    logits = []
    for stored in STORED:
        opened("nemo", tmp_path / stored, stored, tied=True, change=0.0)
        logits.append(megatron_logits(tmp_path / stored, torch.arange(8)[None]))
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2]) and logits[0].std() > 0


@pytest.mark.parametrize("form", ["hf", "nemo"])
def test_verify_takes_a_head_for_the_embedding_that_it_is_tied_to(form: str, tmp_path: Path):
    """Embedding, one layer of two norms, four projections and an MLP of three, final norm: no head is counted."""
    for stored in STORED:
        source = opened(form, tmp_path / stored, stored, tied=True, change=0.0)
        for to in ("hf", "nemo"):
            spec = "local" if to == "nemo" else None
            for upcycling, tensors in ((None, 1 + 9 + 1), (Upcycling(2), 1 + 6 + 1 + 2 * 3 + 1)):
                target = tmp_path / f"{stored} {to} {tensors}"
                convert.plan({"base": source}, TargetOptions(to, layer_spec=spec), upcycling).run(target)
                found = verify({"base": tmp_path / stored}, target)
                assert (found.problems, found.tensors) == ([], tensors), (stored, to)


@pytest.mark.parametrize("form", ["hf", "nemo"])
def test_a_copy_in_a_written_model_is_its_embedding_or_a_problem(form: str, tmp_path: Path):
    """As when somebody saves the target again with both."""
    for stored, change in (("both", 0.0), ("head", 0.0), ("both", 1.0)):
        folder = tmp_path / f"{stored} {change}"
        if change:
            with pytest.raises(ConfigurationError, match="differs from"):
                opened(form, folder, stored, tied=True, change=change)
        else:
            opened(form, folder, stored, tied=True, change=change)
        model = HuggingFaceModel(folder, TIED) if form == "hf" else MegatronModel(folder, TIED)
        if change:
            with pytest.raises(
                ConfigurationError, match=r"'(lm_head|module\.output_layer)\.weight' .* differs from"
            ):
                model.tensor("embedding")
            continue
        assert torch.equal(
            model.tensor("embedding"), torch.arange(40 * 16, dtype=torch.float32).reshape(40, 16)
        )
        assert not [problem for problem in model.problems() if "head" in problem or "output" in problem]


def test_transformers_computes_with_a_head_that_stands_for_both(tmp_path: Path):
    (tmp_path / "text").write_bytes(bytes(range(30)))
    token_ids = torch.arange(8)[None]
    for family in ("llama", "skywork"):
        logits = []
        for stored in STORED:
            folder = tmp_path / family / stored
            folder.parent.mkdir(exist_ok=True)
            opened("hf", folder, stored, tied=True, change=0.0)
            (folder / "config.json").write_text(json.dumps(to_hf_config(replace(DESCRIPTION, family=family))))
            logits.append(logits_of(folder, token_ids))
        assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])
        assert logits[0].std() > 0
    source = open_source(tmp_path / "llama" / "head")
    convert.plan({"base": source}, TargetOptions("hf")).run(tmp_path / "out")
    found = compare_logits(tmp_path / "llama" / "head", tmp_path / "out", tmp_path / "text")
    assert found.preserved and found.relative == 0.0
