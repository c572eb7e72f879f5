"""Llama, Mistral and Qwen: every bit comes back, Megatron computes what transformers does, and so does the upcycled MoE."""

from collections.abc import Iterable, Mapping
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from nemo_skymoe.checkpoint import convert
from nemo_skymoe.checkpoint.convert import TargetOptions
from nemo_skymoe.checkpoint.sources import open_source
from nemo_skymoe.checkpoint.upcycling.options import BASE, Upcycling
from nemo_skymoe.checkpoint.verification.megatron_logits import megatron_logits
from nemo_skymoe.checkpoint.verification.verifier import verify
from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.ranks import run_ranks
from tests.checkpoint import hf_models
from tests.checkpoint.families import FAMILIES, MEGATRON_HAS_YARN, MOES, llama3, saved, yarn
from tests.checkpoint.hf_models import VOCAB_SIZE

TEXT = torch.randint(0, VOCAB_SIZE, (2, 160), generator=torch.Generator().manual_seed(0))
"""Longer than what the scaled families were "trained" with at first."""


def in_megatron(names: Iterable[str]) -> list[str]:
    return [name for name in names if MEGATRON_HAS_YARN or "yarn" not in name]


def converted(
    source: Path, output: Path, to: str, upcycling: Upcycling | None = None, spec: str = "local"
) -> Path:
    options = {} if to == "hf" else {"layer_spec": spec}
    convert.plan({BASE: open_source(source)}, TargetOptions(to, **options), upcycling).run(output)
    return output


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def differing(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    assert found.keys() == expected.keys()
    return [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)]


def by_megatron(*folders: Path) -> list[Tensor]:
    """In one process of their own: Megatron's process groups are not for this one."""
    [logits] = run_ranks(lambda: [megatron_logits(folder, TEXT) for folder in folders], 1)
    return logits


@torch.no_grad()
def by_transformers(model: torch.nn.Module) -> Tensor:
    return model.eval()(TEXT).logits


def difference(one: Tensor, other: Tensor) -> float:
    """max |difference| / max |logit|."""
    assert one.shape == other.shape and one.dtype == other.dtype == torch.float32
    return ((one - other).abs().max() / other.abs().max()).item()


def test_there_and_back_every_bit_is_the_same(tmp_path: Path) -> None:
    """Under the family's own class, which transformers loads without code from the folder."""
    ways = cycle([("nemo", "local"), ("bridge", "te"), ("nemo", "te"), ("bridge", "local")])
    for name, (to, spec) in zip(FAMILIES | MOES, ways, strict=False):
        model = saved(name, tmp_path / name)
        there = converted(tmp_path / name, tmp_path / f"{name}-there", to, spec=spec)
        assert verify({BASE: tmp_path / name}, there).problems == [], name
        back = converted(there, tmp_path / f"{name}-back", "hf")
        assert differing(tensors(back), tensors(tmp_path / name)) == [], name
        again = AutoModelForCausalLM.from_pretrained(back, dtype=torch.float32)
        assert type(again) is type(model)
        assert torch.equal(by_transformers(again), by_transformers(model)), name


def test_megatron_computes_what_transformers_does(tmp_path: Path) -> None:
    models = {name: saved(name, tmp_path / name) for name in in_megatron(FAMILIES | MOES)}
    folders = [converted(tmp_path / name, tmp_path / f"{name}-nemo", "nemo") for name in models]
    for (name, model), found in zip(models.items(), by_megatron(*folders), strict=True):
        result = difference(found, by_transformers(model))
        print(f"{name}: {result:.1e}")
        assert result <= 1e-5, name


def test_the_upcycled_moe_computes_what_its_dense_model_does(tmp_path: Path, remote_code: None) -> None:
    """In Megatron, and in transformers by the code of the export; what is no expert's is the dense model's to the bit."""
    models, upcycled = {}, []
    for name in in_megatron(FAMILIES):
        models[name] = saved(name, tmp_path / name, num_hidden_layers=4)
        moe = converted(tmp_path / name, tmp_path / f"{name}-moe", "nemo", Upcycling(num_experts=4))
        assert verify({BASE: tmp_path / name}, moe).problems == []
        upcycled.append(moe)
        converted(moe, tmp_path / f"{name}-exported", "hf")
    for (name, dense), found in zip(models.items(), by_megatron(*upcycled), strict=True):
        exported = AutoModelForCausalLM.from_pretrained(
            tmp_path / f"{name}-exported", trust_remote_code=True, dtype=torch.float32
        )
        assert type(exported).__name__ == "SkyworkForCausalLM"
        expected, by_export = by_transformers(dense), by_transformers(exported)
        print(
            f"{name}: export {difference(by_export, expected):.1e}, Megatron {difference(found, by_export):.1e}"
        )
        assert difference(by_export, expected) <= 1e-6, name
        assert difference(found, by_export) <= 1e-5, name
        shared = {
            name: tensor
            for name, tensor in tensors(tmp_path / f"{name}-exported").items()
            if "moe" not in name
        }
        theirs = {name: tensor for name, tensor in tensors(tmp_path / name).items() if ".mlp." not in name}
        assert differing(shared, theirs) == [], name


WITHOUT = {"moe_use_logits_norm": False, "num_key_value_heads": 2, "rope_theta": 5e5}
NORMED = {"qk_layernorm": True, "head_dim": 24}


def test_an_moe_without_the_gates_norm_is_written_as_others_load_it(
    tmp_path: Path, remote_code: None
) -> None:
    """Under a class of transformers, without code in the folder: every tensor, and the logits, are the same."""
    cases: tuple[tuple[str, dict[str, Any]], ...] = (
        ("mixtral", WITHOUT),
        ("mixtral", WITHOUT | llama3()),
        ("mixtral", WITHOUT | yarn(attention_factor=0.9)),
        ("qwen3_moe", WITHOUT | NORMED),
        ("qwen3_moe", WITHOUT | NORMED | yarn()),
    )
    for number, (layout, config) in enumerate(cases):
        folder = tmp_path / f"{layout}_{number}"
        hf_models.skywork_moe(folder, dtype=torch.float32, **config)
        exported = converted(folder, folder / "exported", "hf")
        ours = AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True, dtype=torch.float32)
        written = folder / layout
        convert.plan({BASE: open_source(folder)}, TargetOptions("hf", layout=layout)).run(written)
        assert verify({BASE: folder}, written).problems == [] and not list(written.glob("*.py"))
        theirs, loaded = AutoModelForCausalLM.from_pretrained(
            written, dtype=torch.float32, output_loading_info=True
        )
        assert not any(loaded.values()) and theirs.config.model_type == layout
        assert difference(by_transformers(theirs), by_transformers(ours)) <= 1e-5
        back = folder / "back"
        convert.plan({BASE: open_source(written)}, TargetOptions("hf", layout="skywork")).run(back)
        assert differing(tensors(back), tensors(folder)) == []


def test_a_layout_that_cannot_express_the_model_is_refused(tmp_path: Path) -> None:
    for number, (layout, config, because) in enumerate(
        (
            ("mixtral", {}, "the gate's logits are normalised"),
            ("mixtral", WITHOUT | {"add_qkv_bias": True}, "no biases of queries"),
            ("mixtral", WITHOUT | NORMED, "qwen3_moe has"),
            ("qwen3_moe", WITHOUT, "norms of queries and keys are not in the model"),
            ("mixtral", None, "the model is dense and keeps its class"),
        )
    ):
        folder = tmp_path / str(number)
        if config is None:
            hf_models.skywork_dense(folder)
        else:
            hf_models.skywork_moe(folder, **config)
        with pytest.raises(ConfigurationError, match=f"layout is '{layout}', .*{because}"):
            convert.plan({BASE: open_source(folder)}, TargetOptions("hf", layout=layout))
    for to, layout, message in (
        ("nemo", "mixtral", "layout belongs to Hugging Face's form, but to is nemo"),
        ("hf", "llama", "layout is 'llama', expected one of skywork, mixtral, qwen3_moe"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            TargetOptions(to, layout=layout)
