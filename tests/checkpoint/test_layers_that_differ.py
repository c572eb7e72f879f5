"""Models of dense and MoE layers: every command on one whose first layer is dense, against counts by hand and Megatron."""

import json
import re
from dataclasses import asdict, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from nemo_skymoe.architecture import Architecture
from nemo_skymoe.checkpoint import convert
from nemo_skymoe.checkpoint.convert import TargetOptions
from nemo_skymoe.checkpoint.description import Description
from nemo_skymoe.checkpoint.formats import open_torch_dist
from nemo_skymoe.checkpoint.hugging_face import exported_files
from nemo_skymoe.checkpoint.hugging_face import names as hugging_face_names
from nemo_skymoe.checkpoint.hugging_face.configuration import from_hf_config
from nemo_skymoe.checkpoint.sources import open_source
from nemo_skymoe.checkpoint.tensors.model import model_keys
from nemo_skymoe.checkpoint.torch_dist import context as nemo_context
from nemo_skymoe.checkpoint.torch_dist.pickle_check import check_checkpoint
from nemo_skymoe.checkpoint.upcycling.options import Upcycling
from nemo_skymoe.checkpoint.verification.verifier import verify
from nemo_skymoe.cli import app
from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.ranks import run_ranks
from tests.checkpoint import hf_models
from tests.checkpoint.fakes import random_weights
from tests.checkpoint.megatron_files import write, write_context
from tests.checkpoint.verification.test_megatron_logits import (
    by_megatron,
    by_transformers,
    converted,
    difference,
)

FIRST_DENSE = Architecture(
    num_layers=3,
    hidden_size=16,
    ffn_hidden_size=24,
    num_attention_heads=2,
    vocab_size=419,
    num_moe_experts=4,
    moe_layer_freq=(0, 1, 1),
    moe_ffn_hidden_size=8,
)
# Four projections and two norms a layer; a dense MLP, two layers of experts and routers; final norm, embedding, head.
PARAMETERS = 3 * (4 * 16 * 16 + 2 * 16) + 3 * 16 * 24 + 2 * (4 * 3 * 16 * 8 + 4 * 16) + 16 + 2 * 419 * 16
ACTIVATED = PARAMETERS - 2 * 2 * 3 * 16 * 8


def made(folder: Path, sizes: Architecture = FIRST_DENSE) -> Path:
    """In Hugging Face's form, random, in float32."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(1)
    tensors = {
        chunk.tensor: torch.randn(chunk.shape, generator=generator) * (0.3 if len(chunk.shape) > 1 else 0.1)
        + (len(chunk.shape) == 1)
        for chunk in hugging_face_names.chunks(sizes)
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    description = Description(sizes, dtype="float32", max_position_embeddings=256)
    (folder / "config.json").write_text(json.dumps(exported_files.to_hf_config(description)))
    return folder


def skymoe(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [*map(str, arguments)])


def test_counts() -> None:
    assert (FIRST_DENSE.parameters, FIRST_DENSE.activated_parameters) == (PARAMETERS, ACTIVATED)
    alike = replace(FIRST_DENSE, moe_layer_freq=1)
    assert alike == replace(alike, moe_layer_freq=(1, 1, 1)) and alike.ffn_hidden_size == 8
    second = replace(FIRST_DENSE, moe_layer_freq=2)
    assert second.moe_layers == (True, False, True) and second == replace(second, moe_layer_freq=(1, 0, 1))
    assert {key.layer for key in model_keys(FIRST_DENSE) if key.kind == "router"} == {1, 2}
    for wrong in (0, -1, True, 1.5, (0, 0, 0), (1, 1), (1, 2, 1), "1", None, [0, True, 1]):
        with pytest.raises(ConfigurationError, match="moe_layer_freq is "):
            Architecture(**asdict(FIRST_DENSE) | {"moe_layer_freq": wrong})


def test_there_and_back_and_what_both_compute(tmp_path: Path, remote_code: None) -> None:
    """Hugging Face to NeMo to Hugging Face, bit for bit; transformers' logits are Megatron's."""
    from transformers import AutoModelForCausalLM

    source = made(tmp_path / "hf")
    nemo = converted(source, tmp_path / "nemo", "nemo")
    names = open_source(nemo).weights.storage.tensors
    routers = {name: info.shape for name, info in names.items() if "router" in name}
    assert routers == {f"module.decoder.layers.{layer}.mlp.router.weight": (4, 16) for layer in (1, 2)}
    assert names["module.decoder.layers.0.mlp.linear_fc1.weight"].shape == (48, 16)
    assert names["module.decoder.layers.2.mlp.experts.experts.linear_fc1.weight"].shape == (4, 16, 16)
    check_checkpoint(nemo)
    back = converted(nemo, tmp_path / "back", "hf")
    before, after = (load_file(folder / "model.safetensors") for folder in (source, back))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert from_hf_config(json.loads((back / "config.json").read_text())).architecture == FIRST_DENSE
    model = AutoModelForCausalLM.from_pretrained(back, trust_remote_code=True, torch_dtype=torch.float32)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS
    assert difference(by_transformers(model), by_megatron(nemo)) <= 1e-5


def test_fiddle_reads_the_list_of_layers_from_the_context() -> None:
    pytest.importorskip("fiddle", reason="NeMo brings it")
    from fiddle._src.experimental import serialization

    call = nemo_context._Call("types.SimpleNamespace", {"moe_layer_freq": [0, 1, 1], "num_layers": 3})
    read = serialization.load_json(nemo_context._io_json(call).decode())
    assert (read.moe_layer_freq, read.num_layers) == ([0, 1, 1], 3)


@pytest.mark.parametrize("layer_spec", ["local", "te"])
def test_a_checkpoint_of_nemos_own(layer_spec: str, tmp_path: Path) -> None:
    """Described by model.yaml with Megatron's options, under both layer specs' names."""
    sizes = replace(FIRST_DENSE, vocab_size=40)
    weights = random_weights(sizes)
    options = {"moe_layer_freq": [0, 1, 1], "moe_ffn_hidden_size": 8}
    write(tmp_path, weights, torch.float32, layer_spec=layer_spec)
    write_context(tmp_path, sizes, **options)
    found, description = open_torch_dist(tmp_path)
    assert description.architecture == sizes
    for key in (*weights.keys(),):
        assert torch.equal(found.read(key), weights.read(key)), key
    (tmp_path / "context/model.yaml").unlink()
    (tmp_path / "context").rmdir()
    write_context(tmp_path, sizes, **options | {"moe_layer_freq": 2})
    with pytest.raises(ConfigurationError, match="is not the model its configuration describes"):
        open_torch_dist(tmp_path)


def test_commands(tmp_path: Path) -> None:
    source = made(tmp_path / "hf")
    assert skymoe("convert", source, tmp_path / "nemo", "--to", "nemo").exit_code == 0
    for folder in (source, tmp_path / "nemo"):
        found = json.loads(skymoe("inspect", folder, "--json").output)
        assert (found["parameters"], found["activated_parameters"]) == (PARAMETERS, ACTIVATED)
        assert found["architecture"]["moe_layer_freq"] == [0, 1, 1] and found["problems"] == []
        assert re.search(r"moe_layer_freq 0, 1, 1, moe_ffn_hidden_size 8", skymoe("inspect", folder).output)
        refused = skymoe("upcycle", folder, tmp_path / "moe", "--to", "hf")
        assert refused.exit_code == 2 and "is an MoE already, expected a dense model" in refused.output
    expected = {file: file.read_bytes() for file in (tmp_path / "nemo").rglob("*") if file.is_file()}
    for file in sorted(expected)[::7]:
        file.unlink()
    assert "--repair writes" in skymoe("convert", source, tmp_path / "nemo", "--to", "nemo").output
    assert skymoe("convert", source, tmp_path / "nemo", "--to", "nemo", "--repair").exit_code == 0
    assert expected == {file: file.read_bytes() for file in (tmp_path / "nemo").rglob("*") if file.is_file()}


PATTERNS: tuple[tuple[int | tuple[int, ...], int], ...] = (
    ((0, 1, 1), 1),
    ((1, 0, 0), 2),
    (2, 1),
)
"""`moe_layer_freq` of three layers, with the number of dense ones among them."""


def flipped(folder: Path, tensor: torch.Tensor) -> tuple[Path, bytes]:
    """Change the last byte of a tensor in the one file that has it; returns the file, and what it had before."""
    part = tensor.contiguous().numpy().tobytes()
    [file] = [file for file in folder.rglob("*") if file.is_file() and part in file.read_bytes()]
    before = file.read_bytes()
    place = before.index(part) + len(part) - 1
    file.write_bytes(before[:place] + bytes([before[place] ^ 1]) + before[place + 1 :])
    return file, before


@pytest.mark.parametrize(("frequency", "dense"), PATTERNS, ids=str)
def test_verify_knows_every_layer(frequency: int | tuple[int, ...], dense: int, tmp_path: Path) -> None:
    """Six tensors of attention and norms in every layer; three of a dense MLP, or 13 of a router and 4 experts."""
    sizes = replace(FIRST_DENSE, moe_layer_freq=frequency)
    tensors = 3 + 3 * 6 + dense * 3 + (3 - dense) * 13
    source = made(tmp_path / "hf", sizes)
    nemo = converted(source, tmp_path / "nemo", "nemo", layer_spec="local")
    back = converted(nemo, tmp_path / "back", "hf")
    for base, target in ((source, nemo), (nemo, back), (source, back)):
        found = verify({"base": base}, target)
        assert (found.problems, found.tensors) == ([], tensors), (base.name, target.name)
    stored = load_file(source / "model.safetensors")
    mlp, expert = (
        min(layer for layer in range(3) if sizes.moe_layers[layer] is moe) for moe in (False, True)
    )
    for name, kind in (
        (f"model.layers.{mlp}.mlp.down_proj.weight", f"down of layer {mlp}: "),
        (
            f"model.layers.{expert}.block_sparse_moe.experts.3.w2.weight",
            f"down of layer {expert}, expert 3: ",
        ),
    ):
        for target in (nemo, back):
            file, before = flipped(target, stored[name])
            first, *others = verify({"base": source}, target).problems
            assert first.startswith(
                f"{kind}1 of 128 elements differ" if "expert" in kind else f"{kind}1 of 384"
            )
            assert len(others) == 1 and "is not what was written" in others[0]
            file.write_bytes(before)


def test_a_dense_model_is_upcycled_in_every_layer_and_verified(tmp_path: Path) -> None:
    """Upcycling makes an MoE of every layer: six tensors, a router and 4 experts in each of three."""
    source = made(tmp_path / "hf", replace(FIRST_DENSE, num_moe_experts=None))
    for to in ("hf", "nemo"):
        found = verify({"base": source}, converted(source, tmp_path / f"moe {to}", to, Upcycling(4)))
        assert (found.problems, found.tensors) == ([], 3 + 3 * (6 + 13))


def test_dense_layers_named_wrongly_are_refused(tmp_path: Path) -> None:
    config = json.loads((made(tmp_path / "hf") / "config.json").read_text())
    assert config["mlp_only_layers"] == [0] and config["moe_intermediate_size"] == 8
    for change, message in (
        ({"mlp_only_layers": [3]}, "mlp_only_layers is .*, expected numbers of layers, from 0 to 2"),
        ({"mlp_only_layers": [0, 1, 2]}, "expected an MoE layer among them"),
        ({"mlp_only_layers": 0.5}, "mlp_only_layers is 0.5"),
        ({"moe_intermediate_size": -1}, "moe_intermediate_size is -1, expected a positive integer"),
        ({"num_experts": [0, 4, 4]}, "num_experts is .*dense layers are named in mlp_only_layers"),
        ({"first_k_dense_replace": 1}, "first_k_dense_replace is 1"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            from_hf_config(config | change)
    hf_models.llama(tmp_path / "dense", num_hidden_layers=1)
    dense = open_source(tmp_path / "dense")
    moe = convert.plan({"base": dense}, TargetOptions("hf"), Upcycling(2)).weights.architecture
    assert moe.moe_layers == (True,)


def similarities() -> tuple[dict[int, float], dict[int, float]]:
    """Of random experts: the product's, and the mean cosine over all pairs, one pair at a time."""
    from nemo_skymoe.checkpoint.verification.gpt_model import gpt_model, one_rank
    from nemo_skymoe.moe.similarity import expert_similarity

    with one_rank():
        torch.manual_seed(0)
        model = gpt_model(Description(FIRST_DENSE), 512)
        expected = {}
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, mean=0.1)
        for number, layer in enumerate(model.decoder.layers, start=1):
            if hasattr(layer.mlp, "router"):
                experts: Any = layer.mlp.experts.local_experts
                vectors = [torch.cat([p.flatten() for p in expert.parameters()]) for expert in experts]
                pairs = [torch.cosine_similarity(a, b, dim=0).item() for a, b in combinations(vectors, 2)]
                expected[number] = sum(pairs) / len(pairs)
        return expert_similarity([model]), expected


def test_similarity_is_of_the_moe_layers_alone() -> None:
    [(found, expected)] = run_ranks(similarities, 1)
    assert found.keys() == {2, 3} and found == pytest.approx(expected, rel=1e-5)
