"""`nemo llm import`, `nemo llm export` and `nemo skymoe ...`: NeMo's ways into the same conversion."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from nemo.collections import llm
from nemo.lightning import io
from nemo_run.cli import api
from safetensors.torch import load_file
from torch import Tensor

from nemo_skymoe import nemo_cli  # noqa: F401
from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.nemo.model import SkyworkModel, SkyworkMoEModel, SkyworkMoETinyConfig, SkyworkTinyConfig
from nemo_skymoe.ranks import run_ranks
from tests.cases import every
from tests.checkpoint import hf_models


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@every("kind", ["dense", "moe"])
def test_import_and_export_give_every_bit_back(tmp_path: Path, kind: str) -> None:
    if kind == "dense":
        expected, model = hf_models.skywork_dense(tmp_path / "hf"), SkyworkModel(SkyworkTinyConfig())
    else:
        expected, model = hf_models.skywork_moe(tmp_path / "hf"), SkyworkMoEModel(SkyworkMoETinyConfig())
    nemo = llm.import_ckpt(model, f"hf://{tmp_path / 'hf'}", tmp_path / "nemo")
    assert nemo == tmp_path / "nemo"
    assert type(io.load_context(nemo, subpath="model")) is type(model)
    back = llm.export_ckpt(nemo, "hf", tmp_path / "back")
    found = tensors(back)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_what_is_no_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigurationError, match="'hf://Skywork/Skywork-13B-base' is not a folder: download"):
        llm.import_ckpt(SkyworkModel(SkyworkTinyConfig()), "hf://Skywork/Skywork-13B-base", tmp_path / "nemo")
    assert not (tmp_path / "nemo").exists()


def nemo(arguments: Sequence[str]) -> int:
    """The `nemo` command in a process of its own; its exit code."""

    def command() -> int:
        sys.argv = ["nemo", *arguments]
        try:
            api.create_cli()(standalone_mode=True)
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    [code] = run_ranks(command, 1)
    return code


def test_nemo_llm_import_and_export(tmp_path: Path) -> None:
    expected = hf_models.skywork_dense(tmp_path / "hf")
    nemo_path, back = tmp_path / "nemo", tmp_path / "back"
    source = ["model=skywork_13b", f"source=hf://{tmp_path / 'hf'}", f"output_path={nemo_path}"]
    assert nemo(["llm", "import", "--yes", *source]) == 0
    assert nemo(["llm", "export", "--yes", f"path={nemo_path}", "target=hf", f"output_path={back}"]) == 0
    found = tensors(back)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_nemo_skymoe(tmp_path: Path) -> None:
    hf, dense, moe = tmp_path / "hf", tmp_path / "dense", tmp_path / "moe"
    expected = hf_models.skywork_dense(hf)
    assert nemo(["skymoe", "convert", f"source={hf}", f"output_path={dense}"]) == 0
    upcycle = ["skymoe", "upcycle", f"source={dense}", f"output_path={moe}", "num_experts=4"]
    assert nemo([*upcycle, "to=hf", "init=noise", "noise=0.0", "seed=3"]) == 0
    assert nemo(["skymoe", "inspect", f"source={moe}"]) == 0
    assert nemo(["skymoe", "verify", f"source={dense}", f"target={moe}"]) == 0
    found = tensors(moe)
    gate = "model.layers.{}.block_sparse_moe.experts.{}.w1.weight"
    for layer in range(2):
        for expert in range(4):
            dense_gate = expected[f"model.layers.{layer}.mlp.gate_proj.weight"]
            assert torch.equal(found[gate.format(layer, expert)], dense_gate)
    assert nemo(upcycle) == 1, "an output that exists was accepted"


def test_nemo_skymoe_specialized(tmp_path: Path) -> None:
    """Options of the kinds that NeMo-Run reads as dictionaries."""
    first = hf_models.skywork_dense(tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    other = {name: tensor * 2 if ".mlp." in name else tensor for name, tensor in first.items()}
    hf_models.save(tmp_path / "zh", other, config)
    arguments = [
        f"source={tmp_path / 'base'}",
        f"further_sources={{'zh': '{tmp_path / 'zh'}'}}",
        f"output_path={tmp_path / 'moe'}",
        "expert_source={'zh': 3, 'base': 1}",
        "init=specialized",
        "num_experts=4",
        "to=hf",
    ]
    assert nemo(["skymoe", "upcycle", *arguments]) == 0
    found = tensors(tmp_path / "moe")
    downs = [found[f"model.layers.0.block_sparse_moe.experts.{expert}.w2.weight"] for expert in range(4)]
    name = "model.layers.0.mlp.down_proj.weight"
    assert all(torch.equal(down, other[name]) for down in downs[:3]) and torch.equal(downs[3], first[name])
