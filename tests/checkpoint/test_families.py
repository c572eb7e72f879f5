"""Llama, Mistral and Qwen: every bit comes back, Megatron computes what transformers does, and so does the upcycled MoE."""

from collections.abc import Mapping
from itertools import cycle
from pathlib import Path

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
from nemo_skymoe.ranks import run_ranks
from tests.checkpoint.families import FAMILIES, saved
from tests.checkpoint.hf_models import VOCAB_SIZE

TEXT = torch.randint(0, VOCAB_SIZE, (2, 160), generator=torch.Generator().manual_seed(0))
"""Longer than what the scaled families were "trained" with at first."""


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
    for name, (to, spec) in zip(FAMILIES, ways, strict=False):
        model = saved(name, tmp_path / name)
        there = converted(tmp_path / name, tmp_path / f"{name}-there", to, spec=spec)
        assert verify({BASE: tmp_path / name}, there).problems == [], name
        back = converted(there, tmp_path / f"{name}-back", "hf")
        assert differing(tensors(back), tensors(tmp_path / name)) == [], name
        again = AutoModelForCausalLM.from_pretrained(back, dtype=torch.float32)
        assert type(again) is type(model)
        assert torch.equal(by_transformers(again), by_transformers(model)), name


def test_megatron_computes_what_transformers_does(tmp_path: Path) -> None:
    models = {name: saved(name, tmp_path / name) for name in FAMILIES}
    folders = [converted(tmp_path / name, tmp_path / f"{name}-nemo", "nemo") for name in FAMILIES]
    for (name, model), found in zip(models.items(), by_megatron(*folders), strict=True):
        result = difference(found, by_transformers(model))
        print(f"{name}: {result:.1e}")
        assert result <= 1e-5, name


def test_the_upcycled_moe_computes_what_its_dense_model_does(tmp_path: Path, remote_code: None) -> None:
    """In Megatron, and in transformers by the code of the export; what is no expert's is the dense model's to the bit."""
    models, in_megatron = {}, []
    for name in FAMILIES:
        models[name] = saved(name, tmp_path / name, num_hidden_layers=4)
        moe = converted(tmp_path / name, tmp_path / f"{name}-moe", "nemo", Upcycling(num_experts=4))
        assert verify({BASE: tmp_path / name}, moe).problems == []
        in_megatron.append(moe)
        converted(moe, tmp_path / f"{name}-exported", "hf")
    for (name, dense), found in zip(models.items(), by_megatron(*in_megatron), strict=True):
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
