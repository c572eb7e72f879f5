"""The upcycled MoE computes what the dense model does, by Megatron and by transformers, on real text."""

import calendar
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_skymoe.checkpoint import convert
from nemo_skymoe.checkpoint.convert import TargetOptions
from nemo_skymoe.checkpoint.sources import open_source
from nemo_skymoe.checkpoint.upcycling.options import Upcycling
from nemo_skymoe.checkpoint.verification.same_function import compare_logits
from nemo_skymoe.config import ConfigurationError
from tests.checkpoint import hf_models

TEXT = Path(calendar.__file__)
PRESERVING: list[dict[str, Any]] = [
    {"init": "copy"},
    {"init": "noise", "noise": 0.0},
    {"init": "drop", "drop_ratio": 0.0},
    {"init": "granular", "granularity": 2},
]


def upcycle(folder: Path, to: str, options: dict[str, Any], layers: int) -> float:
    """max|difference| / max|logit| between a dense model in transformers and the MoE made of it."""
    if not (folder / "dense").exists():
        hf_models.skywork_dense(folder / "dense", dtype=torch.float32, num_hidden_layers=layers)
    moe = folder / "-".join(map(str, [to, *options.values()]))
    source = open_source(folder / "dense")
    convert.plan({"base": source}, TargetOptions(to), Upcycling(8, **options)).run(moe)
    difference = compare_logits(folder / "dense", moe, TEXT)
    assert difference.tokens == 256 and difference.preserved == (options in PRESERVING)
    assert (difference.problem is None) == (not difference.preserved or difference.relative <= 1e-5)
    return difference.relative


@pytest.mark.parametrize("to", ["hf", "nemo", "bridge"])
def test_four_layers(to: str, tmp_path: Path):
    for options in PRESERVING:
        assert upcycle(tmp_path, to, options, layers=4) <= 1e-6, options
    assert upcycle(tmp_path, to, {"init": "noise", "noise": 0.1}, layers=4) > 1e-3


@pytest.mark.parametrize("to", ["hf", "nemo"])
def test_24_layers(to: str, tmp_path: Path):
    for options in (PRESERVING[0], PRESERVING[3]):
        assert upcycle(tmp_path, to, options, layers=24) <= 1e-5, options


def test_refused_texts(tmp_path: Path):
    hf_models.skywork_dense(tmp_path / "dense")
    convert.plan({"base": open_source(tmp_path / "dense")}, TargetOptions("hf")).run(tmp_path / "copy")
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    with pytest.raises(ConfigurationError, match=r"empty.txt' gives no tokens, expected some below 419"):
        compare_logits(tmp_path / "dense", tmp_path / "copy", empty)
