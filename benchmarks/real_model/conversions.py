"""Every conversion of the model, each proven by `skymoe verify`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from benchmarks.real_model.commands import Workplace
from benchmarks.real_model.published import DENSE
from nemo_skymoe.data.standard_library import read_sources

EXPERTS, TOPK = 8, 2
NEMO, AGAIN = "dense-nemo", "dense-again-hf"
SAMPLE = "sample.txt"
"""A text whose beginning `skymoe verify` gives to both models, in float32."""
INITIALISATIONS: Mapping[str, Sequence[str]] = {
    "copy": ("--moe-router-topk", f"{TOPK}"),
    "noise": ("--moe-router-topk", f"{TOPK}", "--noise", "0.01"),
    "drop": ("--moe-router-topk", f"{TOPK}", "--drop-ratio", "0.5"),
    "granular": ("--moe-router-topk", f"{2 * TOPK}", "--granularity", "2"),
}
"""The ways in which the experts of one dense model start, with options by which a token meets as many weights in each."""


def measure(place: Workplace) -> dict[str, Any]:
    """Convert the model to NeMo's form and back."""
    place.run("skymoe", "convert", DENSE, NEMO, "--to", "nemo")
    place.run("skymoe", "convert", NEMO, AGAIN, "--to", "hf")
    rows = {
        "Hugging Face to NeMo": verified(place, DENSE, NEMO),
        "NeMo to Hugging Face": verified(place, NEMO, AGAIN),
    }
    first, again = (tensors(place.folder / folder) for folder in (DENSE, AGAIN))
    equal = [name for name in first if name in again and torch.equal(first[name], again[name])]
    return {"tensors": len(first), "equal": len(equal), "verified": rows}


def upcycle(
    place: Workplace, init: str, sources: Sequence[str], options: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Upcycle in NeMo's form, export the result to Hugging Face's, and return what `skymoe verify` says of both."""
    moe, export = nemo(init), exported(init)
    experts = ("--num-experts", f"{EXPERTS}")
    place.run("skymoe", "upcycle", *sources, moe, "--to", "nemo", "--init", init, *experts, *options)
    place.run("skymoe", "convert", moe, export, "--to", "hf")
    return {
        f"upcycled, {init}": verified(place, *sources, moe),
        f"upcycled, {init}, to Hugging Face": verified(place, moe, export),
    }


def nemo(name: str) -> str:
    """Return the folder of an MoE in NeMo's form."""
    return f"{name}-nemo"


def exported(name: str) -> str:
    """Return the folder of a model in Hugging Face's form."""
    return f"{name}-hf"


def verified(place: Workplace, *folders: str) -> dict[str, Any]:
    """Return what `skymoe verify` says, which recomputes every tensor."""
    found = _verify(place, *folders)
    return {"tensors": found["tensors"], "bytes": found["bytes"], "differences": len(found["problems"])}


def logits(place: Workplace) -> dict[str, float]:
    """Return the largest difference of logits over the largest logit, in float32, of source and result on a text.

    `skymoe verify --logits` runs a checkpoint of NeMo in Megatron, and one of Hugging Face in transformers.
    """
    (place.folder / SAMPLE).write_text(read_sources(["argparse.py"])["argparse.py"])
    pairs = [(DENSE, NEMO), (NEMO, AGAIN), *((NEMO, nemo(init)) for init in ("copy", "granular"))]
    pairs += [(nemo(init), exported(init)) for init in INITIALISATIONS]
    return {
        " to ".join(pair): _verify(place, *pair, "--logits", SAMPLE)["logits"]["relative"] for pair in pairs
    }


def _verify(place: Workplace, *words: str) -> dict[str, Any]:
    printed = place.run("skymoe", "verify", *words, "--json", may_fail=True).output
    (line,) = [line for line in printed.splitlines() if line.startswith("{")]
    return json.loads(line)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Return all tensors in a folder of safetensors."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return found
